"""Our step against what a user would write: a plain torch loop on one rank, torch DDP on two.

    python scripts/bench/train.py [--pairs 15] [--ranks 1 2]

The same 17.0 M-parameter GPT (untied head, learned positions, LayerNorm, GELU; V 8192, C 384, 6 layers,
T 256, 8 sequences a rank), bf16 compute with float32 weights, float32 gradients on the wire, fused AdamW,
clipping, one thread a rank, both sides in the same processes, in turn.
The peer is torch's own: autocast, fused qkv, SDPA, DDP.
"""
import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from paired import alternate, summary  # noqa: E402

from nanoinfra.config import ModelConfig  # noqa: E402
from nanoinfra.data.batch import Batch  # noqa: E402
from nanoinfra.distributed.mesh import Mesh  # noqa: E402
from nanoinfra.distributed.pool.rank_pool import RankPool  # noqa: E402
from nanoinfra.formulas.parameters import parameter_count  # noqa: E402
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule  # noqa: E402
from nanoinfra.train.config import ModelFlags, TrainFlags  # noqa: E402
from nanoinfra.train.loss import count_valid_tokens  # noqa: E402
from nanoinfra.train.step import execute_schedule  # noqa: E402
from nanoinfra.train.training_pipeline_stage import TrainStage  # noqa: E402

V, C, L, H, T, B = 8192, 384, 6, 6, 256, 8
CONFIG = ModelConfig(V, C, L, H, H, C // H, 4 * C, T, tied=False, family="gpt2")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.o = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).view(-1, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Plain(nn.Module):
    """The peer's model, as one writes it."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.Sequential(*(Block() for _ in range(L)))
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)

    def forward(self, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.head(self.norm(self.blocks(self.embed(x) + self.positions.weight)))
            return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def peer_step(mesh):
    model = Plain()
    assert sum(p.numel() for p in model.parameters()) == parameter_count(CONFIG)
    if mesh.data.size > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)

    def step(x, y):
        model(x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def our_step(mesh):
    replica = TrainStage(CONFIG, TrainFlags(model=ModelFlags(dtype="bfloat16")), mesh)

    def step(x, y):
        batches = [Batch(x, y)]
        [valid] = count_valid_tokens(batches, mesh.data)
        replica.begin_step(batches, valid, lr=1e-4)
        execute_schedule(gradient_accumulation_schedule(1), replica)
        mesh.comm_log.take_records()
    return step


def bench(pairs, steps):
    """On every rank; rank 0's rates in tokens/s over all ranks."""
    mesh = Mesh(dp=int(torch.distributed.get_world_size()))
    draws = torch.Generator().manual_seed(mesh.rank)
    sides = []
    for make in (our_step, peer_step):
        step = make(mesh)

        def run(step=step):
            begin = time.perf_counter()
            for _ in range(steps):
                x, y = torch.randint(V, (2, B, T), generator=draws)
                step(x, y)
            return mesh.data.size * steps * B * T / (time.perf_counter() - begin)
        run()                                # warm up: allocator, oneDNN's choices, DDP's buckets
        sides.append(run)
    return alternate(*sides, pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="in one timing")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/train.json"))
    args = parser.parse_args()
    results = []
    for n in args.ranks:
        with RankPool(n, timeout=1800) as ranks:
            rates = ranks.run(bench, args.pairs, args.steps)[0]
        peer = "a plain torch loop" if n == 1 else "torch DDP"
        results.append(summary(f"training, {n} rank{'s' * (n > 1)} against {peer}", rates, "tokens/s"))
    processor = platform.processor() or platform.machine()
    machine = f"{processor}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
