"""Tensor and sequence parallelism against torch's own (DTensor, `parallelize_module`), on two ranks.

    python scripts/bench/tensor.py [--pairs 9] [--sp none keep gather] [--whole-logits]

bench/train.py's GPT, cut over both ranks: bf16 weights and compute, float32 masters and moments, torch's
fused AdamW, clipping in float32, one thread a rank, both sides in the same processes, in turn. Before that,
in float64, both give the same loss and the same gradients of one batch, or nothing is timed; and what each
side gives to torch.distributed in a step is counted.
The peer at its best: one matrix for q, k, v with its rows in heads' order, so that one column-parallel linear
makes them all; local tensors between the linears; loss_parallel (--whole-logits, without it, was no faster);
masters that are plain tensors, and one sum for all norms' gradients, where DTensor would take a collective
for each. Its SequenceParallel keeps for backward what it has gathered, as --sp-save-gathered does: the same
bytes. Against our --sp as in the paper, which gathers again ("gather"), it sends less and holds more.
"""
import argparse
import contextlib
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor import parallel as tp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from paired import alternate, summary  # noqa: E402
from train import CONFIG, B, Block, C, H, L, Plain, T  # noqa: E402
from zero import ADAMW, N  # noqa: E402
from zero import draw as draw_tokens  # noqa: E402

from nanoinfra.data.batch import Batch  # noqa: E402
from nanoinfra.distributed.mesh import Mesh  # noqa: E402
from nanoinfra.distributed.pool.rank_pool import RankPool  # noqa: E402
from nanoinfra.formulas.collectives import ring_bytes_per_rank  # noqa: E402
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes  # noqa: E402
from nanoinfra.model.initialization import draw_initial_tensor  # noqa: E402
from nanoinfra.parallel.pipeline.schedules import Backward, Forward, ReduceGrads  # noqa: E402
from nanoinfra.train.config import make_train_flags  # noqa: E402
from nanoinfra.train.step import execute_schedule  # noqa: E402
from nanoinfra.train.training_pipeline_stage import TrainStage  # noqa: E402

OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
FLAGS = {"none": {}, "keep": dict(sp=True, sp_save_gathered=True), "gather": dict(sp=True)}


class PeerBlock(Block):
    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, C // H))      # (B, T, H/N, 3, K)
        q, k, v = heads.permute(3, 0, 2, 1, 4)                              # (B, H/N, T, K) each
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Peer(Plain):
    """The peer's model, as one writes it for `parallelize_module`; positions' rows are cut as tokens are."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(PeerBlock() for _ in range(L)))

    def forward(self, x, y):
        logits = self.head(self.norm(self.blocks(self.embed(x) + local(self.positions.weight))))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, 1).to(wide), y.flatten())


def parallelized(mesh, sp, whole, dtype):
    """The peer's model cut over `mesh`, with our first weights."""
    model, tokens = Peer().to(dtype), Shard(1) if sp else Replicate()
    model.load_state_dict(first_weights())
    head = dict(output_layouts=Replicate() if whole else Shard(-1), use_local_output=whole)
    plan = {"embed": tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
            "blocks.*.qkv": tp.ColwiseParallel(input_layouts=tokens),
            "blocks.*.up": tp.ColwiseParallel(input_layouts=tokens),
            "blocks.*.o": tp.RowwiseParallel(output_layouts=tokens),
            "blocks.*.down": tp.RowwiseParallel(output_layouts=tokens),
            "head": tp.ColwiseParallel(input_layouts=tokens, **head)}
    if sp:
        plan |= dict.fromkeys(("blocks.*.norm1", "blocks.*.norm2", "norm"), tp.SequenceParallel())
        rows = distribute_tensor(model.positions.weight.data, mesh, [Shard(0)])
        model.positions.weight = nn.Parameter(rows)
    return tp.parallelize_module(model, mesh, plan)


def first_weights():
    """Our own, in the peer's names: its qkv has for each head the rows of q, k and v."""
    ours = {name: draw_initial_tensor(name, s, L, seed=0) for name, s in parameter_shapes(CONFIG).items()}
    return {theirs: torch.cat([ours[name].unflatten(0, (H, 1, -1)) for name in names], 1).flatten(0, 2)
            if len(names) > 1 else ours[names[0]] for theirs, names in renamed().items()}


def renamed():
    """{the peer's name: ours, or those of q, k and v}."""
    found = {}
    for name in parameter_shapes(CONFIG):
        theirs = name.replace("attn.", "").replace("mlp.", "")
        for part in ("q", "k", "v"):
            theirs = theirs.replace(f".{part}.", ".qkv.")
        found.setdefault(theirs, []).append(name)
    return found


class PeerSide:
    """What a user writes around the peer's model: masters, clipping, AdamW."""

    def __init__(self, sp, whole=False, dtype=torch.bfloat16):
        self.mesh = init_device_mesh("cpu", (N,), mesh_dim_names=("tp",))
        self.model = parallelized(self.mesh["tp"], sp, whole, dtype)
        self.parallel_loss = contextlib.nullcontext if whole else tp.loss_parallel
        self.params = list(self.model.parameters())
        self.cut = [isinstance(p, DTensor) and p.placements[0].is_shard() for p in self.params]
        self.masters = [local(p.detach()).clone().to(torch.promote_types(dtype, torch.float32))
                        for p in self.params]
        self.optimizer = torch.optim.AdamW(self.masters, **ADAMW)

    def gradients(self, x, y):
        """(loss, this rank's gradients, wide)."""
        with self.parallel_loss():
            loss = self.model(x, y)
            loss.backward()
        grads = [placed(p).to(m.dtype) for p, m in zip(self.params, self.masters)]
        parts = [g for g, p in zip(grads, self.params) if is_part(p.grad)]
        if parts:
            flat = torch.cat([g.flatten() for g in parts])
            torch.distributed.all_reduce(flat, group=self.mesh.get_group())
            torch._foreach_copy_(parts, [f.view_as(g) for f, g in
                                         zip(flat.split([g.numel() for g in parts]), parts)])
        for p in self.params:
            p.grad = None
        return loss, grads

    def step(self, x, y):
        _, grads = self.gradients(x, y)
        self.clip(grads)
        for master, grad in zip(self.masters, grads):
            master.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_([local(p) for p in self.params], self.masters)

    def clip(self, grads, limit=1.0):
        norms = torch.stack(torch._foreach_norm(grads)).square()
        cut = torch.tensor(self.cut)
        parted = norms[cut].sum()
        torch.distributed.all_reduce(parted, group=self.mesh.get_group())
        norm = (parted + norms[~cut].sum()).sqrt().item()
        if norm > limit:
            torch._foreach_mul_(grads, limit / norm)


class OurSide:
    def __init__(self, sp, dtype="bfloat16"):
        self.mesh = Mesh(tp=N)
        flags = make_train_flags(dtype=dtype, tp=N, **FLAGS[sp])
        self.replica = TrainStage(CONFIG, flags, self.mesh)

    def gradients(self, x, y):
        batch = Batch(x, y)
        self.replica.begin_step([batch], batch.num_valid_targets, lr=1e-4)
        execute_schedule([Forward(0), Backward(0, is_last=True), ReduceGrads()], self.replica)
        return self.replica.loss, self.replica.grads

    def step(self, x, y):
        self.gradients(x, y)
        self.replica.step()
        self.mesh.comm_log.take_records()


def local(p):
    """The part of a DTensor that is here."""
    return p.to_local() if isinstance(p, DTensor) else p


def is_part(grad):
    return isinstance(grad, DTensor) and grad.placements[0].is_partial()


def placed(p):
    """Of the gradient what belongs to the part of `p` that is here: an embedding's comes with all rows."""
    if isinstance(p, DTensor) and not is_part(p.grad):
        return p.grad.redistribute(placements=p.placements).to_local()
    return local(p.grad)


def prepare():
    """DTensor warns of what it will rename; a rank's warnings are errors otherwise."""
    warnings.simplefilter("ignore")
    torch.randn(64, 64) @ torch.randn(64, 64)


def same(sp, whole):
    """How far apart the gradients of one batch are at most, relative, in float64; above 1e-10 no race."""
    prepare()
    x, y = draw_tokens(torch.Generator().manual_seed(7))[:, :2]
    ours, peer = OurSide(sp, "float64"), PeerSide(sp != "none", whole, torch.float64)
    assert sum(p.numel() for p in Peer().parameters()) == parameter_count(CONFIG)
    (want_loss, want), (got_loss, grads) = ours.gradients(x, y), peer.gradients(x, y)
    worst, norm = 0.0, torch.stack([w.norm() for w in want.values()]).norm()
    by_name = dict(zip(dict(peer.model.named_parameters()), grads))
    for theirs, names in renamed().items():
        grad = by_name[theirs]
        parts = grad.unflatten(0, (-1, 3, C // H)).unbind(1) if len(names) > 1 else [grad]
        for name, part in zip(names, parts):
            got, mine = part.flatten(0, 1) if len(names) > 1 else part, want[name]
            if got.shape != mine.shape:                  # the peer has cut what we hold whole: positions
                mine = mine.chunk(N)[peer.mesh.get_local_rank()]
            worst = max(worst, ((got - mine).norm() / max(mine.norm(), 1e-6 * norm)).item())
    difference = abs(want_loss - float(local(got_loss)))
    assert max(worst, difference) < 1e-10, f"sp {sp}: gradients {worst:.1e} apart, loss {difference:.1e}"
    return worst


class Wire(TorchDispatchMode):
    """Counts what torch.distributed is given: {(operation, dtype): [calls, payload bytes]}."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented                        # it will call what it is made of
        out = func(*args, **(kwargs or {}))
        name = func.__name__.replace("_", "")            # allreduce, allgatherbase, allgatherintotensor, ...
        op = next((op for op in OPS if name.startswith(op.replace("_", ""))), None)
        if op and func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, torch.Tensor)]
            largest = max(tensors, key=lambda t: t.nbytes)               # what the ledger calls payload
            entry = self.seen.setdefault((op, str(largest.dtype).removeprefix("torch.")), [0, 0])
            entry[0] += 1
            entry[1] += largest.nbytes
        return out


def bench(sp, whole, pairs, steps):
    """On every rank; rank 0's rates in tokens/s (all ranks have the same tokens), and what each side sent."""
    prepare()
    draws = torch.Generator().manual_seed(0)
    sides, wires = [], []
    for side in (OurSide(sp), PeerSide(sp != "none", whole)):
        def run(step=side.step):
            begin = time.perf_counter()
            for _ in range(steps):
                step(*draw_tokens(draws))
            return steps * B * T / (time.perf_counter() - begin)
        run()                                # warm up: allocator, oneDNN's choices, DTensor's sharding cache
        with Wire() as wire:
            side.step(*draw_tokens(draws))
        wires.append(wire.seen)
        sides.append(run)
    return alternate(*sides, pairs), wires


def race(sp, args):
    with RankPool(N, timeout=1800) as ranks:
        apart = max(ranks.run(same, sp, args.whole_logits))
        print(f"\nsp {sp}: gradients of one batch in float64 at most {apart:.1e} apart", flush=True)
        rates, wires = ranks.run(bench, sp, args.whole_logits, args.pairs, args.steps)[0]
    name = "tensor parallelism" if sp == "none" else f"tensor and sequence parallelism ({sp})"
    result = summary(f"{name} against torch's DTensor", rates, "tokens/s")
    result["gradients_apart"], result["wire"] = apart, {}
    for side, seen in zip(("ours", "peer"), wires):
        sent = int(sum(ring_bytes_per_rank(op, payload, N) for (op, _), (_, payload) in seen.items()))
        calls = [f"{calls} {op} {dtype} {size / 1e6:.2f} MB" for (op, dtype), (calls, size) in seen.items()]
        print(f"  {side} a step: {', '.join(calls)} (counted); "
              f"a rank sends {sent / 1e6:.2f} MB (modelled)", flush=True)
        result["wire"][side] = {"calls": calls, "sent": sent}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="in one timing")
    parser.add_argument("--sp", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--whole-logits", action="store_true", help="the peer without loss_parallel")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/tensor.json"))
    args = parser.parse_args()
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for sp in args.sp:                       # written after each, so that nothing is lost
        results.append(race(sp, args))
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
