"""Tensor parallelism in one file: a LLaMA, a training loop, and the sums that make t parts of each layer one.

    python scripts/tensor_parallel.py
    torchrun --nproc-per-node 2 scripts/tensor_parallel.py --tp 2
    torchrun --nproc-per-node 2 scripts/tensor_parallel.py --tp 2 --sp
    torchrun --nproc-per-node 4 scripts/tensor_parallel.py --tp 2 --sp

What ranks --tp leaves over is data parallelism. The losses are the same with any of these, and those of
`nanoinfra train --model test --data random --lr-schedule constant --warmup 0 --global-batch 16 --tp TP
[--sp]`.
"""
import argparse
import os

import torch
import torch.distributed as dist

from nanoinfra.config import MODEL_SIZES
from nanoinfra.data.token_datasets import IGNORE_INDEX, RandomTokenDataset
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion, shard_linear
from nanoinfra.parallel.vocab_parallel import VocabParallelEmbedding, vocab_parallel_cross_entropy


def samples(step, per_step, vocab, T, seed=0):
    """The step's sequences (x, y), the same on every rank: documents of unequal length, drawn by number."""
    numbers = range(step * per_step, (step + 1) * per_step)
    pairs = [RandomTokenDataset(vocab).get_sample(g, seed, T) for g in numbers]
    return [torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1)]  # (G, T) each


def divide(model, axis, region):
    """Leave `model` this rank's part, with `region`'s collectives where parts meet; returns its first token.

    Column-parallel, then row-parallel: between the two no rank needs another. Heads stay whole.
    """
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        for linear in (attn.q, attn.k, attn.v, mlp.gate, mlp.up):
            shard_linear(linear, 0, axis)                                     # outputs: (D/t, C)
        for linear in (attn.o, mlp.down):
            shard_linear(linear, 1, axis)                                     # inputs: (C, D/t)
        attn.in_proj = mlp.in_proj = region.column_parallel_linear  # f: an all-reduce, or with sp a gather
        attn.out_proj = mlp.out_proj = region.row_parallel_linear   # then g, the sum
    V, each = model.config.vocab, -(-model.config.vocab // axis.size)
    start = axis.rank * each                                         # the last rank has fewer tokens
    model.embed.weight = model.head.weight = torch.nn.Parameter(
        model.embed.weight.detach()[start:min(V, start + each)].clone())            # (V/t, C), tied
    model.embed = VocabParallelEmbedding(model.embed, start, region)
    return start


def is_whole(name):
    """Does every rank hold all of parameter `name`? Norms alone: a matrix is cut."""
    return "norm" in name


def sum_parts(grads, axis):
    """Under sp a rank's norms have seen its own tokens: their gradients are parts of a sum."""
    parts = [grad for name, grad in grads.items() if is_whole(name)]
    flat = comm.all_reduce(torch.cat(parts), axis, "tp grads")
    for grad, total in zip(parts, flat.split([grad.numel() for grad in parts])):
        grad.copy_(total)


def clip(grads, axis, limit=1.0):
    """Scale the gradient, of which a rank holds a part, to a 2-norm of at most `limit`; returns the norm."""
    squares = {name: grad.double().square().sum() for name, grad in grads.items()}
    parts = sum(square for name, square in squares.items() if not is_whole(name))
    whole = sum(square for name, square in squares.items() if is_whole(name))       # the same on every rank
    norm = (comm.all_reduce(parts, axis, "norm") + whole).sqrt().item()
    for grad in grads.values():
        grad.mul_(min(1.0, limit / norm))
    return norm


def adamw(params, lr):
    """Matrices decay, vectors do not."""
    params = list(params)
    matrices, vectors = ([p for p in params if (p.dim() > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="ranks that share a layer's heads")
    parser.add_argument("--sp", action="store_true", help="cut the stream between them by tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences in one step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()

    if "RANK" in os.environ:                 # torchrun started us
        dist.init_process_group("gloo")
    mesh = Mesh(dp=world_size() // args.tp, tp=args.tp)
    set_torch_threads()

    config = MODEL_SIZES["test"].config             # 4 query heads, 2 KV heads: for at most 2 ranks
    region = SequenceParallelRegion(mesh.tp,
                                    save_gathered=False) if args.sp else TensorParallelRegion(mesh.tp)
    model = init_weights(Decoder(config), seed=0).to(getattr(torch, args.dtype))
    start = divide(model, mesh.tp, region)
    shared = DataParallel(model, mesh.data)                          # sees smaller parameters, no more
    optimizer = adamw(model.parameters(), args.lr)
    mesh.comm_log.take_records()

    for step in range(args.steps):
        x, y = samples(step, args.global_batch, config.vocab, args.seq)
        valid = int((y != IGNORE_INDEX).sum())  # of the step, known before any backward
        x, y = x[mesh.dp.rank::mesh.dp.size], y[mesh.dp.rank::mesh.dp.size]     # the same on all of a tp axis

        shared.zero_grad()
        shared.prepare_for_backward(is_last=True)
        hidden = model.hidden_states(x)                                     # (B, T, C), with sp (B, T/t, C)
        # logits are (B T, V/t)
        loss = vocab_parallel_cross_entropy(hidden, model.head.weight, y, valid, region, start)
        loss.backward()
        grads = shared.finish_grad_sync()  # {name: this rank's part of it}
        if args.sp:
            sum_parts(grads, mesh.tp)
        norm = clip(grads, mesh.tp)
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
        optimizer.zero_grad()

        rows = [row for row in mesh.comm_log.take_records() if row.tag == "layers"]
        total = comm.all_reduce(loss.detach().double(), mesh.data, "total")
        if mesh.rank == 0:
            sent = sum(row.payload_bytes for row in rows) // config.layers
            print(f"step {step + 1:3}  loss {total:.10f}  grad norm {norm:.6f}; a layer: "
                  f"{len(rows) // config.layers} collectives, {sent:,} bytes", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
