"""ZeRO against DeepSpeed's (stages 1 to 3) and torch's FSDP2 (stage 3): pace, bytes sent, peak memory.

    python3 -m venv PEERS
    PEERS/bin/pip install --no-deps --require-hashes -r requirements.lock
    PEERS/bin/pip install --no-build-isolation torch==2.13.0 -e . wheel ninja
    PEERS/bin/pip install --no-build-isolation deepspeed==0.19.8
    PEERS/bin/python scripts/bench/zero.py [--pairs 9] [--against deepspeed fsdp2] [--stages 1 2 3] [--memory]

bench/train.py's GPT on two ranks: bf16 compute, float32 masters and moments, torch's fused AdamW, clipping,
one thread a rank, both sides in the same processes, in turn. Weights travel in bf16 everywhere. Gradients:
DeepSpeed's bf16 engine sums them in bf16, so against it ours does too; FSDP2 sums them in float32 by its
MixedPrecisionPolicy, so against it ours does. What each side gives to torch.distributed is counted in a step
before the timing. --memory: processes of their own for each side and stage, VmHWM after five steps less
VmRSS before the model is built. FSDP2 alone needs no second environment: --against fsdp2.
"""
import argparse
import contextlib
import io
import json
import logging
import os
import platform
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))
from paired import alternate, summary  # noqa: E402
from train import CONFIG, B, Plain, T, V  # noqa: E402

from nanoinfra.data.batch import Batch  # noqa: E402
from nanoinfra.distributed.mesh import Mesh  # noqa: E402
from nanoinfra.distributed.pool.rank_pool import RankPool  # noqa: E402
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule  # noqa: E402
from nanoinfra.train.config import make_train_flags  # noqa: E402
from nanoinfra.train.loss import count_valid_tokens  # noqa: E402
from nanoinfra.train.step import execute_schedule  # noqa: E402
from nanoinfra.train.training_pipeline_stage import TrainStage  # noqa: E402

N = 2                                                    # ranks
GRADS = {"deepspeed": "bfloat16", "fsdp2": "float32"}    # what a peer sums gradients in, and ours against it
STAGES = {"deepspeed": (1, 2, 3), "fsdp2": (3,)}
ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
# Chosen among a few by short runs. Stage 3 as the paper has it: weights released after use (by default
# DeepSpeed would keep a model this small whole). Without its patch of F.linear, which would stay for both.
DEEPSPEED = {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 20_000_000}
DEEPSPEED_3 = {"memory_efficient_linear": False, "stage3_max_reuse_distance": 0,
               "stage3_prefetch_bucket_size": 2_000_000}


class Model(Plain):
    """The peers' model; they cast its weights to bf16, so no autocast."""

    def forward(self, x, y):
        logits = self.head(self.norm(self.blocks(self.embed(x) + self.positions.weight)))
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def our_step(stage, peer):
    mesh = Mesh(dp=N)
    flags = make_train_flags(dtype="bfloat16", grad_dtype=GRADS[peer], zero=stage)
    replica = TrainStage(CONFIG, flags, mesh)

    def step(x, y):
        batches = [Batch(x, y)]
        [valid] = count_valid_tokens(batches, mesh.data)
        replica.begin_step(batches, valid, lr=1e-4)
        execute_schedule(gradient_accumulation_schedule(1), replica)
        mesh.comm_log.take_records()
    return step


def fsdp2_step(stage, peer):
    model = Model()
    how = dict(mesh=torch.distributed.init_device_mesh("cpu", (N,)),
               mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)

    def step(x, y):
        model(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def deepspeed_step(stage, peer):
    import deepspeed
    zero = {"stage": stage, **DEEPSPEED, **(DEEPSPEED_3 if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": B, "bf16": {"enabled": True}, "gradient_clipping": 1.0,
              "zero_optimization": zero}
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(x, y):
        engine.backward(engine(x, y))
        engine.step()
    return step


STEP = {"ours": our_step, "deepspeed": deepspeed_step, "fsdp2": fsdp2_step}


def prepare(peer):
    """Load what a peer loads, on a rank whose warnings are errors otherwise."""
    warnings.simplefilter("ignore")
    if peer == "deepspeed":
        rank = str(torch.distributed.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(N), LOCAL_SIZE=str(N),
                          DS_ACCELERATOR="cpu")
        import deepspeed
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed()
    torch.randn(64, 64) @ torch.randn(64, 64)
    torch.distributed.all_reduce(torch.ones(1))


class Wire(TorchDispatchMode):
    """Counts what torch.distributed is given: {(operation, dtype): [calls, payload bytes]}."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if func.namespace == "c10d" and tensors:
            largest = max(tensors, key=lambda t: t.nbytes)               # what the ledger calls payload
            name = func.__name__.partition(".")[0].strip("_").removesuffix("_base")
            entry = self.seen.setdefault((name, str(largest.dtype).removeprefix("torch.")), [0, 0])
            entry[0] += 1
            entry[1] += largest.nbytes
        return func(*args, **(kwargs or {}))


def sent(seen):
    """Bytes a rank sends by the ring algorithm (modelled), from what was counted."""
    return sum((1 + (op == "allreduce")) * payload * (N - 1) // N for (op, _), (_, payload) in seen.items())


def draw(generator):
    return torch.randint(V, (2, B, T), generator=generator)


def bench(stage, peer, pairs, steps):
    """On every rank; rank 0's rates in tokens/s over all ranks, and what each side sent."""
    prepare(peer)
    draws = torch.Generator().manual_seed(torch.distributed.get_rank())
    sides, wires = [], []
    for name in ("ours", peer):
        step = STEP[name](stage, peer)

        def run(step=step):
            begin = time.perf_counter()
            for _ in range(steps):
                step(*draw(draws))
            return N * steps * B * T / (time.perf_counter() - begin)
        run()                                # warm up: allocator, oneDNN's choices, DeepSpeed's trace
        with Wire() as wire:
            step(*draw(draws))
        wires.append(wire.seen)
        sides.append(run)
    return alternate(*sides, pairs), wires


def peak(side, stage, peer, steps=5):
    """Bytes this rank's memory grew by at its peak, from just before the model was built."""
    prepare(side)
    draws = torch.Generator().manual_seed(torch.distributed.get_rank())
    start = status("VmRSS")
    step = STEP[side](stage, peer)
    for _ in range(steps):
        step(*draw(draws))
    return status("VmHWM") - start


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def race(stage, peer, args):
    with RankPool(N, timeout=1800) as ranks:
        rates, wires = ranks.run(bench, stage, peer, args.pairs, args.steps)[0]
    result = summary(f"ZeRO-{stage} against {peer}, gradients in {GRADS[peer]}", rates, "tokens/s")
    result["wire"] = {}
    for side, seen in zip(("ours", peer), wires):
        calls = [f"{calls} {op} {dtype} {size / 1e6:.1f} MB"
                 for (op, dtype), (calls, size) in seen.items() if size > 1000]
        print(f"  {side} a step: {', '.join(calls)} (counted); "
              f"a rank sends {sent(seen) / 1e6:.1f} MB (modelled)")
        result["wire"][side] = {"calls": calls, "sent": sent(seen)}
    return result


def weigh(stage, peer, runs):
    """Peak memory of both sides; a run's number is the larger rank's."""
    peaks = {side: [] for side in ("ours", peer)}
    for _ in range(runs):
        for side, found in peaks.items():
            with RankPool(N, timeout=600) as ranks:
                found.append(ranks.run(peak, side, stage, peer))
    ours, theirs = (median(map(max, found)) for found in peaks.values())
    each = "; ".join(f"{side} " + " ".join(f"{max(run) / 1e6:.0f}" for run in found)
                     for side, found in peaks.items())
    print(f"\nmemory of a rank, ZeRO-{stage} against {peer}: ours {ours / 1e6:.0f} MB, "
          f"peer {theirs / 1e6:.0f} MB, medians of {runs} ({each})", flush=True)
    return {"name": f"memory, ZeRO-{stage} against {peer}", "unit": "bytes", "runs": peaks, "ours": ours,
            "peer": theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="0: none, only memory")
    parser.add_argument("--steps", type=int, default=3, help="in one timing")
    parser.add_argument("--against", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--memory", type=int, nargs="?", const=3, default=0, metavar="RUNS")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/zero.json"))
    args = parser.parse_args()
    matches = [(stage, peer) for peer in args.against for stage in STAGES[peer] if stage in args.stages]
    work = [partial(race, stage, peer, args) for stage, peer in matches if args.pairs]
    work += [partial(weigh, stage, peer, args.memory) for stage, peer in matches if args.memory]
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for part in work:                        # written after each, so that nothing is lost
        results.append(part())
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
