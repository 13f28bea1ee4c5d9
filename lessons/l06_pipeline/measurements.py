"""Run pipelines inside each rank: one whose stages sleep instead of computing, and the trainer's own.

In `rehearse_schedule` stages sleep for slots of time, which they can do at the same time even on two cores.
Each message carries the slot in which it was sent, so the ranks count their idle slots exactly.
`run_pipeline_steps` takes steps of the real decoder.
"""
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.parallel import tensor_parallel
from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    ReduceGrads,
    insert_sends_and_recvs,
    mark_last_backwards,
)
from nanoinfra.parallel.pipeline.simulator import chunks_per_stage
from nanoinfra.parallel.pipeline.stage import PipelineStage
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage


def schedule_of_order(order: Callable, p: int, m: int) -> list[list]:
    """The instructions of each of p stages for the compute order of `order(p, r, m)`, and its messages."""
    each = insert_sends_and_recvs([list(order(p, r, m)) for r in range(p)], 1)
    return [[*mark_last_backwards(stage), ReduceGrads(), OptimizerStep()] for stage in each]


class SleepingStage(PipelineStage):
    """A pipeline stage that sleeps for `times` = (F, B, W) slots of `slot` seconds for each micro-batch.

    `real` and `counted` fill with (computation, begin, end), in seconds and in slots. A computation begins in
    the slot in which the stage is free and the message that it needs has arrived.
    """

    def __init__(self, mesh, times: Sequence[float], slot: float, v: int = 1, halves: bool = False):
        super().__init__(mesh.pp, mesh.duplicate_axis("pp"), v, split_backward=halves, device=mesh.device)
        self.times, self.slot, self.now = [t / v for t in times], slot, 0.0
        self.weight = nn.Parameter(torch.ones((), device=mesh.device))
        self.real, self.counted = [], []

    def embed_input(self, micro: int) -> torch.Tensor:
        """The first stage's input, available from slot 0 on. It needs a gradient, as embedded tokens do."""
        return torch.zeros(self.activation_shape(micro), device=self.device, requires_grad=True)

    def activation_shape(self, micro: int) -> tuple[int, ...]:
        """The shape of a message: one number, the slot in which it was sent."""
        return (1,)

    def forward_chunk(self, chunk: int, x: torch.Tensor, micro: int) -> torch.Tensor:
        """Sleep for a forward; the output carries the slot in which it was ready."""
        y = _Sleep.apply(x, self.weight, self, micro, chunk)
        return y.sum() if (self.axis.rank, chunk) == self.last_stage_chunk else y

    def work(self, what, slots: float, came: float) -> float:
        """Sleep for `slots`, not before slot `came`; returns the slot in which computation `what` is done."""
        begin = time.monotonic()
        time.sleep(slots * self.slot)
        self.real.append((what, begin, time.monotonic()))
        start = max(self.now, came)
        self.now = start + slots
        self.counted.append((what, start, self.now))
        return self.now


def rehearse_schedule(lists: list[list], times: Sequence[float], slot: float = 0.0, device: str = "cpu",
                      repeats: int = 1) -> list[tuple[list, list]]:
    """Rehearse a schedule, one instruction list a stage: [(spans in s, spans in slots) of each repeat].

    `lists` may have computations and messages alone. More ranks than stages rehearse side by side.
    """
    p, trials = len(lists), []
    mesh = Mesh(pp=p, dp=world_size() // p, device=device)
    order = [what for what in lists[mesh.pp.rank] if not isinstance(what, (ReduceGrads, OptimizerStep))]
    halves = any(isinstance(what, BackwardInput) for what in order)
    for _ in range(repeats):
        stage = SleepingStage(mesh, times, slot, chunks_per_stage(lists), halves)
        comm.barrier(mesh.pp)
        execute_schedule(order, stage)
        stage.wait_sends()
        trials.append((stage.real, stage.counted))
    return trials


def run_pipeline_steps(config: ModelConfig, kind: str, p: int, v: int, batches: list[Batch],
                       dtype: str = "float64", device: str = "cpu", lists: list[list] | None = None,
                       repeats: int = 1) -> dict:
    """Run steps of the trainer's own pipeline stage on this rank, after one warm-up step, without the
    optimizer.

    Returns, of the last step: "loss" (this rank's part), "grads" {name: tensor}, "spans", "rows"
    (communication records), "kept" (most bytes that its layers saved at a time); and "seconds" of all.
    `batches` are micro-batches without ignored targets. `lists` replace the schedule of that kind.
    """
    mesh = Mesh(pp=p, dp=world_size() // p, device=device)
    flags = make_train_flags(dtype=dtype, pp=p, schedule=kind, virtual_stages=v)
    replica = TrainStage(config, flags, mesh)
    # all but the step
    order = (lists[mesh.pp.rank] if lists else replica.build_step_schedule(len(batches)))[:-1]
    _, *steps = [_step(mesh, replica, order, batches) for _ in range(1 + repeats)]
    return {"loss": replica.loss.item(), "grads": {name: g.cpu() for name, g in replica.grads.items()},
            **steps[-1], "seconds": [step["seconds"] for step in steps]}


def _step(mesh, replica, order, batches):
    """Run one step until its gradients are summed; returns its measurements."""
    replica.begin_step(batches, sum(batch.targets.numel() for batch in batches) * mesh.data.size)
    chunks = replica.parallel_model.chunks
    kept = _Kept(parameter for chunk in chunks for parameter in chunk.model.parameters())
    hooks = [hook for chunk in chunks for hook in _keeping(chunk.model.blocks, kept)]
    comm.barrier(mesh.pp)
    mesh.comm_log.take_records()
    begin = time.monotonic()
    spans = execute_schedule(order, replica)
    if mesh.device == "cuda":
        torch.cuda.synchronize()
    rows = mesh.comm_log.take_records()
    comm.barrier(mesh.pp)
    seconds = time.monotonic() - begin
    for hook in hooks:
        hook.remove()
    return {"spans": spans, "rows": rows, "kept": kept.peak_bytes, "seconds": seconds}


def _keeping(blocks, kept):
    """Hooks by which `kept` counts what the blocks save, but not what embedding and loss save."""
    for block in blocks:
        yield block.register_forward_pre_hook(lambda *_: kept.__enter__() and None)
        yield block.register_forward_hook(lambda *_: kept.__exit__(None, None, None))


class _Kept(SavedActivations):
    """Count detached tensors: in a split backward some graph nodes are never freed."""

    def _keep(self, tensor):
        return super()._keep(tensor.detach())


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stage, micro, chunk):
        ctx.of = stage, micro, chunk
        return torch.full_like(x, stage.work(Forward(micro, chunk), stage.times[0], x.item()))

    @staticmethod
    def backward(ctx, grad):
        (stage, micro, chunk), (into, weights, *_) = ctx.of, tensor_parallel.inputs_needing_grad(ctx)
        kind = Backward if into and weights else BackwardInput if into else BackwardWeight
        came = 0.0 if (stage.axis.rank, chunk) == stage.last_stage_chunk else grad.item()
        slots = stage.times[1] * into + stage.times[2] * weights
        done = stage.work(kind(micro, chunk), slots, came)
        return torch.full_like(grad, done), grad.sum(), None, None, None
