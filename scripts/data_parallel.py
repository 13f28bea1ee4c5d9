"""Data parallelism in one file: a GPT, a training loop, and the all-reduce that makes N ranks one.

    python scripts/data_parallel.py
    torchrun --nproc-per-node 2 scripts/data_parallel.py
    torchrun --nproc-per-node 4 scripts/data_parallel.py --how each

The losses are the same on any number of ranks, and those of `nanoinfra train --model test --data random
--optimizer sgd --lr 0.5 --lr-schedule constant --warmup 0 --clip 0 --global-batch 16`.
"""
import argparse
import os

import torch
import torch.distributed as dist

from nanoinfra.config import SIZES
from nanoinfra.data.sample_order import IGNORE, Random
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.init import init_weights
from nanoinfra.parallel.data_parallel import STEPS, DataParallel


def samples(step, per_step, vocab, T, seed=0):
    """The step's sequences (x, y), the same on every rank: documents of unequal length, drawn by number."""
    numbers = range(step * per_step, (step + 1) * per_step)
    pairs = [Random(vocab).sample(g, seed, T) for g in numbers]
    return [torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1)]  # (G, T) each


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=STEPS, default="overlap", help="when gradients leave")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences in one step, over all ranks")
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()

    if "RANK" in os.environ:                 # torchrun started us
        dist.init_process_group("gloo")
    mesh = Mesh(dp=dist.get_world_size() if dist.is_initialized() else 1)
    use_threads()

    size = SIZES["test"]
    model = init_weights(Decoder(size.model), seed=0).to(getattr(torch, args.dtype))
    shared = DataParallel(model, mesh.data, args.how)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)  # Adam would hide gradients N times too large

    for step in range(args.steps):
        x, y = samples(step, args.global_batch, size.model.vocab, args.seq)
        valid = int((y != IGNORE).sum())                         # of the step, known before any backward
        x, y = x[mesh.dp.rank::mesh.dp.size], y[mesh.dp.rank::mesh.dp.size]

        shared.begin_step()
        shared.before_backward(last=True)
        logits = model(x)                                        # (B, T, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE,
                                                 reduction="sum") / valid
        loss.backward()                                          # buckets leave from inside, if --how overlap
        for name, gradient in shared.finish().items():           # summed over ranks: the mean over tokens
            model.get_parameter(name).grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()

        rows = [row for row in mesh.ledger.take() if row.tag == "grads"]
        total = comm.all_reduce(loss.detach().double(), mesh.data)
        if mesh.rank == 0:
            sent, waited = sum(row.payload for row in rows), sum(row.wait_s for row in rows)
            print(f"step {step + 1:3}  loss {total:.10f}  {len(rows)} all-reduces, {sent:,} bytes, "
                  f"waited {waited * 1e3:.1f} ms", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
