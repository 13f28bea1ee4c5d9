"""1F1B against torch's own (`torch.distributed.pipelining`, Schedule1F1B), on two stages over gloo.

    python scripts/bench/pipeline.py [--pairs 9] [--micro 8 4]

bench/train.py's GPT cut after the same layer, 8 sequences a step in 8 or 4 micro-batches: bf16 weights,
compute and messages, gradients of micro-batches summed in float32, float32 masters and moments, torch's fused
AdamW, clipping in float32, one thread a rank, both sides in the same processes, in turn. Before that, in
float64, both give the same loss and the same gradients of one step, or nothing is timed; and what each side
gives to torch.distributed in a step is counted.
The peer at its best: its stages know the shapes of what travels, so it infers nothing; the last stage keeps
no logits (return_outputs=False); nothing is scaled afterwards; one matrix for q, k and v; a norm in one call.
"""
import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from paired import alternate, summary  # noqa: E402
from tensor import renamed  # noqa: E402
from train import CONFIG, B, C, L, Plain, T, V  # noqa: E402
from zero import ADAMW  # noqa: E402

from nanoinfra.data.batch import Batch  # noqa: E402
from nanoinfra.distributed.mesh import Mesh  # noqa: E402
from nanoinfra.distributed.pool.rank_pool import RankPool  # noqa: E402
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes  # noqa: E402
from nanoinfra.formulas.pipeline import pipeline_sent_bytes_per_stage, split_layers_into_chunks  # noqa: E402
from nanoinfra.model.initialization import draw_initial_tensor  # noqa: E402
from nanoinfra.train.config import make_train_flags  # noqa: E402
from nanoinfra.train.step import execute_schedule  # noqa: E402
from nanoinfra.train.training_pipeline_stage import TrainStage  # noqa: E402

P = 2                                                    # stages


class PeerStage(Plain):
    """The layers from `start` to `stop` of the peer's model, as one writes a stage for it."""

    def __init__(self, start, stop):
        super().__init__()
        self.blocks = self.blocks[start:stop]
        if start > 0:
            self.embed = self.positions = None
        if stop < L:
            self.norm = self.head = None

    def forward(self, x):
        x = self.blocks(self.embed(x) + self.positions.weight if self.embed else x)      # (B, T, C)
        return self.head(self.norm(x)) if self.head else x                               # or (B, T, V)


class PeerSide:
    """What a user writes around the peer's schedule: the loss, masters, clipping, AdamW."""

    def __init__(self, m, dtype=torch.bfloat16):
        self.rank, self.m = torch.distributed.get_rank(), m
        start, stop = split_layers_into_chunks(CONFIG, P, T)[self.rank]
        self.model = PeerStage(start, stop).to(dtype)
        self.names = {name: renamed()[name] for name in self.model.state_dict()}
        self.model.load_state_dict({theirs: first_weights(names) for theirs, names in self.names.items()})
        tokens = torch.zeros(B // m, T, dtype=torch.long)
        stream, logits = (torch.empty(B // m, T, n, dtype=dtype, requires_grad=True) for n in (C, V))
        first, last = self.rank == 0, self.rank == P - 1
        stage = PipelineStage(self.model, self.rank, P, torch.device("cpu"),
                              input_args=tokens if first else stream, output_args=logits if last else stream)
        self.schedule = Schedule1F1B(stage, m, self.loss, scale_grads=False)
        wide = torch.promote_types(dtype, torch.float32)
        self.masters = {p: p.detach().clone().to(wide) for p in self.model.parameters()}
        self.sums = {p: torch.zeros_like(master) for p, master in self.masters.items()}
        self.filled = set()
        for p in self.sums:
            p.register_post_accumulate_grad_hook(self.arrive)
        self.optimizer = torch.optim.AdamW(list(self.masters.values()), **ADAMW)

    def loss(self, logits, targets):
        """A micro-batch's share of the step's mean."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), reduction="sum") / (B * T)

    def arrive(self, p):
        """Sum over micro-batches in float32, as ours does; bf16 would lose what the later ones add."""
        self.sums[p].add_(p.grad) if p in self.filled else self.sums[p].copy_(p.grad)
        self.filled.add(p)
        p.grad = None

    def gradients(self, x, y):
        """(loss of the step, on the last stage; this stage's gradients), wide."""
        losses = []
        if self.rank == 0:
            self.schedule.step(x)
        else:
            self.schedule.step(target=y, losses=losses, return_outputs=False)
        self.filled.clear()
        return sum(losses), list(self.sums.values())

    def step(self, x, y):
        _, grads = self.gradients(x, y)
        squares = torch.stack(torch._foreach_norm(grads)).square().sum()
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt().item()
        if norm > 1.0:
            torch._foreach_mul_(grads, 1.0 / norm)
        for p, master in self.masters.items():
            master.grad = self.sums[p]
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.masters), list(self.masters.values()))


class OurSide:
    def __init__(self, m, dtype="bfloat16"):
        self.m, self.mesh = m, Mesh(pp=P)
        flags = make_train_flags(dtype=dtype, pp=P, schedule="1f1b")
        self.replica = TrainStage(CONFIG, flags, self.mesh)
        self.list = self.replica.build_step_schedule(m)

    def gradients(self, x, y):
        self.begin(x, y)
        execute_schedule(self.list[:-1], self.replica)
        return self.replica.loss, self.replica.grads

    def step(self, x, y):
        self.begin(x, y)
        execute_schedule(self.list, self.replica)
        self.mesh.comm_log.take_records()

    def begin(self, x, y):
        self.replica.begin_step(list(map(Batch, x.chunk(self.m), y.chunk(self.m))), B * T, lr=1e-4)


def first_weights(names):
    """Ours; q, k and v in one."""
    every = parameter_shapes(CONFIG)
    return torch.cat([draw_initial_tensor(name, every[name], L, seed=0) for name in names])


def draw_tokens(draws):
    """A step's sequences, the same on both stages."""
    return torch.randint(V, (2, B, T), generator=draws)


def same(m):
    """How far apart the gradients of one step are at most, relative, in float64; above 1e-10 no race."""
    warnings.simplefilter("ignore")
    x, y = draw_tokens(torch.Generator().manual_seed(7))
    ours, peer = OurSide(m, "float64"), PeerSide(m, torch.float64)
    (want_loss, want), (got_loss, grads) = ours.gradients(x, y), peer.gradients(x, y)
    worst, norm = 0.0, torch.stack([w.norm() for w in want.values()]).norm()
    for (theirs, _), grad in zip(peer.model.named_parameters(), grads, strict=True):
        names = peer.names[theirs]
        for name, part in zip(names, grad.chunk(len(names)), strict=True):
            worst = max(worst, ((part - want[name]).norm() / max(want[name].norm(), 1e-6 * norm)).item())
    difference = abs(float(want_loss) - float(got_loss))
    assert max(worst, difference) < 1e-10, f"gradients {worst:.1e} apart, loss {difference:.1e}"
    return worst, sum(p.numel() for p in peer.masters)


class Wire(TorchDispatchMode):
    """Counts what torch.distributed is given: {operation and dtype: [calls, payload bytes]}."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            given = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            name = func._schema.name.removeprefix("c10d::").strip("_")
            entry = self.seen.setdefault(f"{name} {str(given[0].dtype).removeprefix('torch.')}", [0, 0])
            entry[0] += 1
            entry[1] += sum(x.nbytes for x in given)
        return func(*args, **(kwargs or {}))


def bench(m, pairs, steps):
    """On every rank; rank 0's rates in tokens/s, and what each side gave to torch.distributed in a step."""
    warnings.simplefilter("ignore")
    draws = torch.Generator().manual_seed(0)
    sides, wires = [], []
    for side in (OurSide(m), PeerSide(m)):
        def run(step=side.step):
            torch.distributed.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                step(*draw_tokens(draws))
            return steps * B * T / (time.perf_counter() - begin)
        run()                                # warm up: allocator, oneDNN's choices, the peer's stages
        with Wire() as wire:
            side.step(*draw_tokens(draws))
        wires.append(wire.seen)
        sides.append(run)
    return alternate(*sides, pairs), wires


def race(m, args):
    with RankPool(P, timeout=1800) as ranks:
        apart, sizes = zip(*ranks.run(same, m))
        assert sum(sizes) == parameter_count(CONFIG)
        print(f"\n{m} micro-batches: in float64 gradients at most {max(apart):.1e} apart", flush=True)
        results = ranks.run(bench, m, args.pairs, args.steps)
    result = summary(f"1F1B with {m} micro-batches against torch's", results[0][0], "tokens/s")
    result["gradients_apart"], result["wire"] = max(apart), {}
    want = pipeline_sent_bytes_per_stage(CONFIG, P, m, B // m, T, 2)
    for i, side in enumerate(("ours", "peer")):
        seen = [wires[i] for _, wires in results]
        sent = [sum(size for op, (_, size) in wire.items() if op.startswith("send")) for wire in seen]
        assert sent == want, f"{side} sent {sent}, want {want}"
        calls = [[f"{n} {op} {size / 1e6:.3f} MB" for op, (n, size) in wire.items()] for wire in seen]
        print(f"  {side} a step, by stage: {'; '.join(map(', '.join, calls))} (counted)", flush=True)
        result["wire"][side] = {"calls": calls, "sent": sent}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="in one timing")
    parser.add_argument("--micro", type=int, nargs="+", default=[8, 4], help="micro-batches in a step")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pipeline.json"))
    args = parser.parse_args()
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for m in args.micro:                     # written after each, so that nothing is lost
        results.append(race(m, args))
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
