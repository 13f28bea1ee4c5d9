"""Three dimensions in one file: a LLaMA cut by layers, by tokens and inside each layer, and a training loop.

    python scripts/three_d.py
    torchrun --nproc-per-node 4 scripts/three_d.py --pp 2 --tp 2
    torchrun --nproc-per-node 8 scripts/three_d.py --pp 2 --tp 2 --sp --micro-batches 2

Ranks that --pp x --tp leave over are data parallelism. The losses are the same with any of these, and those
of `nanoinfra train --model test --data random --lr-schedule constant --warmup 0 --global-batch 16 --pp PP
--tp TP --dp DP [--sp]`.
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
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.pipeline import stage as pipeline
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.train.step import execute_schedule

LR, DECAY = 3e-3, 0.1                        # matrices decay, vectors do not


class Stage(pipeline.PipelineStage):
    """One rank's part of its layers. What it has to say of them; when they run, the schedule says."""

    def __init__(self, model, mesh, dtype, sp):
        super().__init__(mesh.pp, mesh.duplicate_axis("pp"), dtype=dtype)
        self.model = model                                           # some of the layers
        self.tensor = TensorParallel(model, mesh, sp)                # of each of them a part
        self.nll_of = VocabParallelCrossEntropy(model.head) if model.head else None  # of the last stage
        self.data = DataParallel(model, mesh.data)                   # sees fewer and smaller parameters
        self.ends = mesh.first_last_subgroup("pp")  # first and last stage: embedding and head are one weight

    def begin(self, x, y, valid, micro_batches):
        """A new step: this data rank's (G/dp, T) tokens and targets; `valid` targets on all ranks."""
        self.x, self.y, self.valid = x.tensor_split(micro_batches), y.tensor_split(micro_batches), valid
        self.loss = torch.zeros((), dtype=torch.float64)
        self.data.zero_grad()

    def embed_input(self, micro):
        return self.model.embed_tokens(self.x[micro], torch.arange(self.x[micro].shape[1]))     # (B, T, C)

    def forward_chunk(self, chunk, x, micro):
        x = self.model.blocks_and_norm(x, torch.arange(self.x[micro].shape[1]))        # (B, T, C)
        if not self.nll_of:
            return x                                                 # on to the next stage
        loss = self.nll_of(x, self.y[micro]).sum() / self.valid
        self.loss += loss.detach()
        return loss

    def activation_shape(self, micro):
        B, T = self.x[micro].shape                                   # known, not negotiated
        self.tensor.region.set_seq_len(T)
        return B, self.tensor.region.local_seq_len(T), self.model.config.width   # (B, T, C), with sp T/t

    def prepare_for_backward(self, chunk, is_last):
        self.data.prepare_for_backward(is_last)                        # after the last, gradients are sent

    def gradients(self):
        """{name: this rank's part}, summed: over data, under sp norms' over tp, the tied weight's over pp."""
        self.wait_sends()                                            # what was sent has arrived
        grads = self.tensor.all_reduce_partial_grads(self.data.finish_grad_sync())
        if self.ends and "embed.weight" in grads:
            comm.all_reduce(grads["embed.weight"], self.ends, "tied")
        return grads


def samples(step, per_step, vocab, T, seed=0):
    """The step's sequences (x, y), the same on every rank: documents of unequal length, drawn by number."""
    numbers = range(step * per_step, (step + 1) * per_step)
    pairs = [RandomTokenDataset(vocab).get_sample(g, seed, T) for g in numbers]
    return [torch.stack([torch.from_numpy(pair[k]) for pair in pairs]) for k in (0, 1)]  # (G, T) each


def clip(grads, mesh, ends, limit=1.0):
    """Scale the gradient to a 2-norm of at most `limit`. What several ranks hold alike counts once."""
    def mine(name):                          # norms are on all tp ranks, the tied weight at both ends
        return ends.rank == 0 if name == "embed.weight" else mesh.tp.rank == 0 or "norm" not in name
    squares = sum(grad.double().square().sum() for name, grad in grads.items() if mine(name))
    for axis in (mesh.tp, mesh.pp):                                  # data ranks hold the same: no sum
        squares = comm.all_reduce(squares, axis, "norm")
    for grad in grads.values():
        grad.mul_(min(1.0, limit / squares.sqrt().item()))


def adamw(params, lr):
    matrices, vectors = ([p for p in params if (p.dim() > 1) is many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pp", type=int, choices=(1, 2, 4), default=1, help="stages of layers")
    parser.add_argument("--tp", type=int, choices=(1, 2), default=1, help="ranks that share a layer's heads")
    parser.add_argument("--sp", action="store_true", help="cut the stream between matrices by tokens")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences in one step, over all ranks")
    parser.add_argument("--micro-batches", type=int, default=3, help="parts a data rank's go through in")
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()
    if "RANK" in os.environ:                 # torchrun started us
        dist.init_process_group("gloo")
    mesh = Mesh(pp=args.pp, dp=world_size() // (args.pp * args.tp), tp=args.tp)
    set_torch_threads()
    config, dtype = MODEL_SIZES["test"].config, getattr(torch, args.dtype)
    border = split_layers_into_chunks(config, args.pp, args.seq)[mesh.pp.rank]
    chunk = pipeline.cut_to_pipeline_chunk(init_weights(Decoder(config), seed=0).to(dtype), *border)
    stage = Stage(chunk, mesh, dtype, "gather" if args.sp else "none")
    instructions = build_pipeline_schedule("1f1b", args.pp, args.micro_batches)[mesh.pp.rank][:-2]
    optimizer = adamw(list(stage.model.parameters()), LR)
    mesh.comm_log.take_records()
    for step in range(args.steps):
        x, y = samples(step, args.global_batch, config.vocab, args.seq)
        mine = slice(mesh.dp.rank, None, mesh.dp.size)               # the same for all pp and tp ranks
        stage.begin(x[mine], y[mine], int((y != IGNORE_INDEX).sum()), args.micro_batches)
        execute_schedule(instructions, stage)
        grads = stage.gradients()
        clip(grads, mesh, stage.ends)
        for name, p in stage.model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
        optimizer.zero_grad()
        rows = [row for row in mesh.comm_log.take_records() if row.op != "recv"]
        sent = {axis: sum(row.payload_bytes for row in rows if row.axis_name == axis)
                for axis in ("pp", "data", "tp")}
        total = comm.all_reduce(comm.all_reduce(stage.loss, mesh.pp), mesh.data)     # the last stage's
        if mesh.rank == 0:
            said = ", ".join(f"{axis} {size:,}" for axis, size in sent.items())
            print(f"step {step + 1:3}  loss {total:.10f}; rank 0 sent, in bytes: {said}", flush=True)
        mesh.comm_log.take_records()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
