"""ZeRO in one file: a GPT, a training loop, and states that N ranks hold once between them, not N times.

    python scripts/zero.py
    torchrun --nproc-per-node 2 scripts/zero.py --stage 1
    torchrun --nproc-per-node 4 scripts/zero.py --stage 3 --micro-batches 2

Stage 0 is data parallelism: all whole, everywhere. 1 cuts the optimizer's state, 2 the gradients too, 3 the
weights too. The losses are the same at any stage, on any number of ranks, and those of `nanoinfra train
--model test --data random --lr-schedule constant --warmup 0 --global-batch 16 --zero STAGE`.
"""
import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanoinfra.config import SIZES
from nanoinfra.data.sample_order import IGNORE, Random
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.init import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.zero import Zero


def samples(step, per_step, vocab, T, seed=0):
    """The step's sequences (x, y), the same on every rank: documents of unequal length, drawn by number."""
    numbers = range(step * per_step, (step + 1) * per_step)
    pairs = [Random(vocab).sample(g, seed, T) for g in numbers]
    return [torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1)]  # (G, T) each


def share(model, axis, stage):
    """`model` as this rank's part of the data-parallel ranks. Stage 3 gathers a unit of it at a time."""
    if stage == 0:
        return DataParallel(model, axis)
    units = [[model.embed], *([block] for block in model.blocks), [model.norm, model.head]]
    return Zero(model, axis, stage, units)


def adamw(shards, lr):
    """AdamW on what is this rank's to move; it knows nothing of other ranks."""
    matrices, vectors = ([s for s in shards.values() if (s.dim() > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def clip(grads, axis, stage, limit=1.0):
    """Scale the step's gradient, of which a rank may hold its rows alone, to a 2-norm of at most `limit`."""
    squares = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum()
    norm = (comm.all_reduce(squares, axis, "norm") if stage else squares).sqrt().item()
    for grad in grads.values():
        grad.mul_(min(1.0, limit / norm))


def held(model, shared, optimizer):
    """[bytes of weights, gradients, moments] on this rank, each storage counted once."""
    waiting = shared.reducer.buckets if isinstance(shared, Zero) else shared.buckets
    sums = shared.reducer.grads.values() if isinstance(shared, Zero) else ()
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    kinds = ([*model.parameters(), *shared.shards.values()],
             [*sums, *(bucket.flat for bucket in waiting if bucket.flat is not None)], moments)
    return [sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kind)}.values())
            for kind in kinds]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences in one step, over all ranks")
    parser.add_argument("--micro-batches", type=int, default=2, help="parts a rank runs its share of them in")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()

    if "RANK" in os.environ:                 # torchrun started us
        dist.init_process_group("gloo")
    mesh = Mesh(dp=dist.get_world_size() if dist.is_initialized() else 1)
    use_threads()

    size, a = SIZES["test"], args.micro_batches
    model = init_weights(Decoder(size.model), seed=0).to(getattr(torch, args.dtype))
    shared = share(model, mesh.data, args.stage)
    optimizer = adamw(shared.shards, args.lr)
    mesh.ledger.take()                                           # the broadcast of the first weights

    for step in range(args.steps):
        x, y = samples(step, args.global_batch, size.model.vocab, args.seq)
        valid = int((y != IGNORE).sum())                         # of the step, known before any backward
        x, y = x[mesh.dp.rank::mesh.dp.size], y[mesh.dp.rank::mesh.dp.size]
        total, most = torch.zeros((), dtype=torch.float64), [0, 0, 0]

        shared.begin_step()
        for i, (x_, y_) in enumerate(zip(x.tensor_split(a), y.tensor_split(a))):
            logits = model(x_)                                   # (B, T, V); stage 3 gathers and frees inside
            loss = F.cross_entropy(logits.flatten(0, 1), y_.flatten(), ignore_index=IGNORE,
                                   reduction="sum") / valid
            shared.before_backward(last=i == a - 1)
            loss.backward()                                      # from stage 2 on, buckets leave from inside
            most = list(map(max, most, held(model, shared, optimizer)))
            total += loss.detach()
        grads = shared.finish()                                  # {name: this rank's rows of the sum}
        clip(grads, mesh.data, args.stage)
        for name, shard in shared.shards.items():
            shard.grad = grads[name]
        optimizer.step()
        optimizer.zero_grad()
        shared.publish()                                         # the new weights, wherever they are whole

        weights, gradients, moments = map(max, most, held(model, shared, optimizer))
        rows = [row for row in mesh.ledger.take() if row.tag in ("grads", "weights")]
        total = comm.all_reduce(total, mesh.data, "loss")
        if mesh.rank == 0:
            sent = sum(row.payload for row in rows)
            print(f"step {step + 1:3}  loss {total:.10f}  bytes held: {weights:,} weights, {gradients:,} "
                  f"gradients, {moments:,} moments; sent: {sent:,} in {len(rows)} calls", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
