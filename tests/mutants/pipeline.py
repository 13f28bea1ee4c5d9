"""Known-wrong pipelines: orders that do not work or wait, and stages whose sums are not the model's."""
import time
from types import SimpleNamespace

import torch

from lessons.l06_pipeline import measurements as pipes
from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.parallel.parallelize import ParallelModel
from nanoinfra.parallel.pipeline import schedules
from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    Forward,
    OptimizerStep,
    RecvGrad,
    ReduceGrads,
    insert_sends_and_recvs,
)
from nanoinfra.parallel.pipeline.simulator import (
    max_micro_batches_in_flight,
    simulate_schedule,
    validate_schedule,
)
from nanoinfra.train import training_pipeline_stage
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.optimizer import unscale_and_clip_grads
from nanoinfra.train.step import execute_schedule

T = 7
CONFIG = ModelConfig(vocab=61, width=12, layers=8, heads=2, kv_heads=1, head_dim=6, hidden=20, context=T,
                     tied=True)
KINDS = [("gpipe", 4, 8, 1), ("1f1b", 4, 8, 1), ("1f1b", 4, 3, 1), ("zb-h1", 4, 8, 1),
         ("interleaved", 4, 8, 2)]
STEPS = [("1f1b", 4, 3, 1), ("zb-h1", 2, 4, 1), ("interleaved", 2, 4, 2)]
TIMES, SLOT = (1, 1, 1), 0.02                # slots of s: forward, backward to the input, to the weights
order = Check("order")
pipeline = Check("pipeline")
overlap = Check("overlap")


@order.criterion("every stage can carry it out", "property")
def _(subject):
    for kind in KINDS:
        try:
            validate_schedule(subject(*kind))
        except ValueError as error:
            raise CriterionNotMet(f"{kind}: {error}") from error


@order.criterion("keeps as few micro-batches as the paper", "resource")
def _(subject):
    for kind, p, m, v in KINDS:
        for r, stage in enumerate(subject(kind, p, m, v)):
            want = formulas.predicted_micro_batches_in_flight(kind, p, r, m, v)
            if (got := max_micro_batches_in_flight(stage)) > want:
                raise CriterionNotMet(f"{kind}: stage {r} of {p} keeps {got} of {m} micro-batches, want "
                                      f"{want}")


@order.criterion("idles as long as the paper says", "resource")
def _(subject):
    for kind, p, m, v in KINDS:
        want = formulas.pipeline_idle_seconds(kind, p, m, *TIMES, v)
        got = max(simulate_schedule(subject(kind, p, m, v), *(t / v for t in TIMES)).idle_seconds)
        if not abs(got - want) < 1e-9:
            raise CriterionNotMet(f"{kind}: a stage of {p} idles {got} slots with {m} micro-batches, want "
                                  f"{want}")


@pipeline.criterion("the loss is one rank's", "property")
def _(subject):
    for kind, p, m, _, want, results in _runs(subject):
        got = sum(result["loss"] for result in results)
        if not abs(got / want["loss"] - 1) < 1e-12:
            raise CriterionNotMet(f"{kind} on {p} stages, {m} micro-batches: the loss is {got}, want "
                                  f"{want['loss']}")


@pipeline.criterion("gradients are one rank's", "parity")
def _(subject):
    for kind, p, _, _, want, results in _runs(subject):
        for r, got in enumerate(results):
            for name, grad in got["grads"].items():
                whole = want["grads"][name]
                off = (grad - whole).norm() / max(whole.norm(), 1e-6 * want["norm"])
                if not off < 1e-10:
                    raise CriterionNotMet(f"stage {r} of {p}, {kind}: {name} is off by {off:.1e} of its size")


@pipeline.criterion("the norm counts each number once", "parity")
def _(subject):
    for kind, p, _, _, want, results in _runs(subject):
        for r, got in enumerate(results):
            if not abs(got["norm"] / want["norm"] - 1) < 1e-10:
                raise CriterionNotMet(f"stage {r} of {p}, {kind}: the norm is {got['norm']}, want "
                                      f"{want['norm']}")


@pipeline.criterion("sends a message a border, there and back", "resource")
def _(subject):
    for kind, p, m, v, _, results in _runs(subject):
        want = formulas.pipeline_sent_bytes_per_stage(CONFIG, p, m, 2, T, 8, v)
        if (got := [result["sent"] for result in results]) != want:
            raise CriterionNotMet(f"{kind}: stages send {got} bytes, want {want}")


@overlap.criterion("stages work at the same time", "speed")
def _(subject):
    lists = schedules.build_pipeline_schedule("gpipe", 4, 4)
    want, serial = simulate_schedule(lists, *TIMES).step_seconds * SLOT, sum(TIMES) * 4 * 4 * SLOT
    got = min(max(rank_pool_for_checks(4).run(seconds, subject, lists)) for _ in range(3))
    if got > (want + serial) / 2:
        raise CriterionNotMet(f"4 micro-batches on 4 stages take {got:.2f} s, {want:.2f} by the clock and "
                              f"{serial:.2f} one stage at a time")


def step(kind, p, m, v):
    """One rank's part of a step: its loss, gradients, bytes sent; the norm."""
    mesh = Mesh(pp=p)
    flags = make_train_flags(dtype="float64", pp=p, schedule=kind, virtual_stages=v)
    stage = training_pipeline_stage.TrainStage(CONFIG, flags, mesh)
    x, y = torch.randint(CONFIG.vocab, (2, 2 * m, T), generator=torch.Generator().manual_seed(m))
    for i in range(2 * m):
        y[i, :i % T] = IGNORE_INDEX
    mesh.comm_log.take_records()
    stage.begin_step(list(map(Batch, x.split(2), y.split(2))), int((y != IGNORE_INDEX).sum()))
    execute_schedule(stage.build_step_schedule(m)[:-1], stage)
    sent = sum(row.payload_bytes for row in mesh.comm_log.take_records() if row.op == "send")
    norm = unscale_and_clip_grads(dict(stage.grads), 0, axes=stage.parallel_model.grad_norm_axes(),
                                  counted_in_norm=stage.parallel_model.counted_in_norm)
    return {"loss": stage.loss.item(), "norm": norm, "sent": sent,
            "grads": {name: grad.clone() for name, grad in stage.grads.items()}}


def seconds(rehearse, lists):
    """That a rehearsed step takes this rank."""
    begin = time.monotonic()
    rehearse(lists, TIMES, SLOT)
    return time.monotonic() - begin


def _runs(subject):
    for kind, p, m, v in STEPS:
        [want] = rank_pool_for_checks(1).run(step, "1f1b", 1, m, 1)
        yield kind, p, m, v, want, rank_pool_for_checks(p).run(subject, kind, p, m, v)


def one_at_a_time(kind, p, m, v):
    """A serial pipeline: a micro-batch goes all the way and back before the next one starts."""
    lists = insert_sends_and_recvs([[what for k in range(m) for what in (
        *(Forward(k, c) for c in range(v)), *(Backward(k, c) for c in reversed(range(v))))]
        for _ in range(p)], v)
    return [[*schedules.mark_last_backwards(one), ReduceGrads(), OptimizerStep()] for one in lists]


def without_a_receive(kind, p, m, v):
    lists = schedules.build_pipeline_schedule(kind, p, m, v)
    lists[0].remove(RecvGrad(1))
    return lists


def stages_swapped(kind, p, m, v):
    lists = schedules.build_pipeline_schedule(kind, p, m, v)
    return [lists[0], lists[2], lists[1], *lists[3:]]


def all_forwards_first(kind, p, m, v):
    return schedules.build_pipeline_schedule("gpipe" if kind == "1f1b" else kind, p, m, v)


def never_splits(kind, p, m, v):
    return schedules.build_pipeline_schedule("1f1b" if kind == "zb-h1" else kind, p, m, v)


class DividesAgain(training_pipeline_stage.TrainStage):
    def loss_grad(self, loss):
        return torch.full_like(loss, 1 / len(self.micro_batches))


class ForgetsTheOtherEnd(ParallelModel):
    def finish_grad_sync(self):
        self.tied_axis = None
        return super().finish_grad_sync()


class CountsBothEnds(ParallelModel):
    def counted_in_norm(self, name):
        return True


def layers_swapped(config, n, seq):
    borders = formulas.split_layers_into_chunks(config, n, seq)
    borders[-3:-1] = borders[-3:-1][::-1]
    return borders


def sends_twice(x, axis, to, tag="", async_op=False):
    return comm.send(torch.cat([x, x]), axis, to, tag, async_op=async_op)


def receives_twice(x, axis, source, tag="", async_op=False):
    both = comm.recv(torch.cat([x, x]), axis, source, tag, async_op=async_op)
    return SimpleNamespace(wait=lambda: both.wait()[:len(x)])


TWICE = SimpleNamespace(send=sends_twice, recv=receives_twice)


def serially(lists, *more):
    return pipes.rehearse_schedule(one_at_a_time("gpipe", len(lists), 4, 1), *more)


def in_step(todo, stage):
    """Nobody begins a computation before all have ended the one before."""
    begun = False
    for what in todo:
        if isinstance(what, (Forward, Backward)):
            if begun:
                comm.barrier(stage.axis)
            begun = True
        execute_schedule([what], stage)


EXECUTED, KEPT, IDLE = (criterion.name for criterion in order.criteria)
LOSS, GRADS, NORM, SENT = (criterion.name for criterion in pipeline.criteria)
[BUSY] = (criterion.name for criterion in overlap.criteria)
CHUNKS = "nanoinfra.train.training_pipeline_stage:ParallelModel"
REPLICA = "nanoinfra.train.training_pipeline_stage:TrainStage"
SPLIT = "nanoinfra.parallel.parallelize:split_layers_into_chunks"
COMM = "nanoinfra.parallel.pipeline.stage:comm"
MUTANTS = [
    Mutant("a schedule with a missing receive", order, without_a_receive, EXECUTED),
    Mutant("two stages' orders swapped", order, stages_swapped, EXECUTED),
    Mutant("GPipe called 1F1B", order, all_forwards_first, KEPT),
    Mutant("a serial pipeline, on the clock", order, one_at_a_time, IDLE),
    Mutant("a zero bubble that splits nothing", order, never_splits, IDLE),
    Mutant("micro-batch gradients divided twice", pipeline, patched(step, REPLICA, DividesAgain), GRADS),
    Mutant("stages swapped", pipeline, patched(step, SPLIT, layers_swapped), LOSS),
    Mutant("tied gradients not summed", pipeline, patched(step, CHUNKS, ForgetsTheOtherEnd), GRADS),
    Mutant("the norm counts the tied weight at both ends", pipeline,
           patched(step, CHUNKS, CountsBothEnds), NORM),
    Mutant("every message sent twice", pipeline, patched(step, COMM, TWICE), SENT),
    Mutant("a serial pipeline, timed", overlap, serially, BUSY),
    Mutant("stages in step", overlap,
           patched(pipes.rehearse_schedule, "lessons.l06_pipeline.measurements:execute_schedule",
                   in_step), BUSY),
]
