"""Pipeline parallelism in one file: a LLaMA in stages, a training loop, and lists that say who does what.

    python scripts/pipeline.py
    torchrun --nproc-per-node 2 scripts/pipeline.py
    torchrun --nproc-per-node 4 scripts/pipeline.py --schedule zb-h1 --micro-batches 8
    torchrun --nproc-per-node 2 scripts/pipeline.py --schedule interleaved --chunks 2

Every rank is a stage, with --chunks of the model; of these there are at most 4, as many as layers. The losses
are the same with any of these, and those of `nanoinfra train --model test --data random --lr-schedule
constant --warmup 0 --global-batch 16 --pp RANKS --schedule SCHEDULE --virtual-stages CHUNKS`.
"""
import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanoinfra.config import MODEL_SIZES
from nanoinfra.data.token_datasets import IGNORE_INDEX, RandomTokenDataset
from nanoinfra.distributed import comm
from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.pipeline.schedules import SCHEDULES, build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import simulate_schedule
from nanoinfra.parallel.pipeline.stage import PipelineStage, cut_to_pipeline_chunk
from nanoinfra.train.step import execute_schedule


class Stage(PipelineStage):
    """One rank's chunks of a decoder. What it has to say of them; when each runs, the schedule says."""

    def __init__(self, chunks, mesh, dtype, halves):
        super().__init__(mesh.pp, mesh.duplicate_axis("pp"), len(chunks), dtype, split_backward=halves)
        self.chunks, self.width = chunks, chunks[0].config.width

    def begin(self, x, y, micro_batches):
        """A new step: (G, T) tokens and targets, which every stage knows; the stream it does not."""
        self.x, self.y = x.tensor_split(micro_batches), y.tensor_split(micro_batches)
        self.valid = int((y != IGNORE_INDEX).sum())  # of the step, known before any backward
        self.loss = torch.zeros((), dtype=torch.float64)

    def embed_input(self, micro):
        return self.chunks[0].embed_tokens(self.x[micro], torch.arange(self.x[micro].shape[1]))  # (B, T, C)

    def forward_chunk(self, chunk, x, micro):
        model = self.chunks[chunk]
        x = model.blocks_and_norm(x, torch.arange(x.shape[1]))                         # (B, T, C)
        if not model.head:
            return x                                                 # on to the next chunk, wherever it is
        logits, targets = model.head(x).flatten(0, 1), self.y[micro].flatten()                   # (B T, V)
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum") / self.valid
        self.loss += loss.detach()
        return loss

    def activation_shape(self, micro):
        return *self.x[micro].shape, self.width                      # (B, T, C): known, not negotiated


def samples(step, per_step, vocab, T, seed=0):
    """The step's sequences (x, y), the same on every rank: documents of unequal length, drawn by number."""
    numbers = range(step * per_step, (step + 1) * per_step)
    pairs = [RandomTokenDataset(vocab).get_sample(g, seed, T) for g in numbers]
    return [torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1)]  # (G, T) each


def clip(named, mesh, ends, limit=1.0):
    """Scale the gradient, of which each stage holds a part, to a 2-norm of at most `limit`."""
    again = ends and ends.rank > 0                                   # the tied weight is at both ends
    squares = sum(p.grad.double().square().sum() for name, p in named.items()
                  if not (again and name == "embed.weight"))
    norm = comm.all_reduce(squares, mesh.pp, "norm").sqrt().item()
    for p in named.values():
        p.grad.mul_(min(1.0, limit / norm))


def adamw(params, lr):
    """Matrices decay, vectors do not."""
    matrices, vectors = ([p for p in params if (p.dim() > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def picture(lists):
    """What the stages do, if each forward takes 1 and each half of a backward 1: F, B, W or an idle dot."""
    marks = {"Forward": "F", "Backward": "BB", "BackwardInput": "B", "BackwardWeight": "W"}
    for r, stage in enumerate(simulate_schedule(lists, 1, 1, 1).compute_spans):
        line = ""
        for what, begin, _ in stage:
            line = line.ljust(int(begin), ".") + marks[type(what).__name__]
        yield f"stage {r}  {line}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b")
    parser.add_argument("--chunks", type=int, default=1, help="of a stage; interleaved needs two or more")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences in one step")
    parser.add_argument("--micro-batches", type=int, default=4, help="parts they go through the stages in")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()

    if "RANK" in os.environ:                 # torchrun started us
        dist.init_process_group("gloo")
    mesh, config = Mesh(pp=world_size()), MODEL_SIZES["test"].config
    set_torch_threads()

    p, dtype = mesh.pp.size, getattr(torch, args.dtype)
    lists = build_pipeline_schedule(args.schedule, p, args.micro_batches, args.chunks)     # of every stage
    borders = split_layers_into_chunks(config, p * args.chunks, args.seq)[mesh.pp.rank::p]
    chunks = [cut_to_pipeline_chunk(init_weights(Decoder(config), seed=0).to(dtype), *border)
              for border in borders]
    stage = Stage(chunks, mesh, dtype, halves=args.schedule == "zb-h1")
    ends = mesh.first_last_subgroup("pp")  # first and last stage: embedding and head are one weight
    named = {name: param for chunk in chunks for name, param in chunk.named_parameters()}
    optimizer = adamw(named.values(), args.lr)
    if mesh.rank == 0:
        print(*picture(lists), sep="\n")

    for step in range(args.steps):
        stage.begin(*samples(step, args.global_batch, config.vocab, args.seq), args.micro_batches)
        execute_schedule(lists[mesh.pp.rank][:-2], stage)  # all but its end, which is this:
        stage.wait_sends()                                           # what was sent has arrived
        if ends and "embed.weight" in named:
            comm.all_reduce(named["embed.weight"].grad, ends, "tied")
        clip(named, mesh, ends)
        optimizer.step()
        optimizer.zero_grad()

        rows = [row for row in mesh.comm_log.take_records() if row.op in ("send", "recv")]
        total = comm.all_reduce(stage.loss, mesh.pp, "loss")         # the last stage's
        if mesh.rank == 0:
            sent = sum(row.payload_bytes for row in rows if row.op == "send")
            waited = sum(row.wait_seconds for row in rows)
            print(f"step {step + 1:3}  loss {total:.10f}; stage 0 sent {sent:,} bytes and waited "
                  f"{waited * 1e3:.1f} ms", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
