"""A step is a schedule, and a schedule is data.

A generator yields instructions; one executor runs them on a stage. The same list can be drawn, counted and
checked with no process started. Accumulation over m micro-batches is the schedule of a pipeline with one
stage. ShallowSpeed (Boehm 2022) has the idea; GPipe and 1F1B are other generators of the same words.
"""
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Forward:
    """Run micro-batch `micro` through the stage and keep what backward needs."""
    micro: int


@dataclass(frozen=True)
class Backward:
    """Turn micro-batch `micro` into gradients. After the `last` one gradients are complete and may leave."""
    micro: int
    last: bool = False


@dataclass(frozen=True)
class ReduceGrads:
    """Wait until every gradient is the sum over the data axis."""


@dataclass(frozen=True)
class Step:
    """Clip, and let the optimizer move the weights."""


class Stage(Protocol):
    """What the executor drives."""

    def forward(self, micro: int) -> None: ...
    def backward(self, micro: int, last: bool) -> None: ...
    def reduce_grads(self) -> None: ...
    def step(self) -> None: ...


def accumulate(micro_batches: int) -> Iterator:
    """The one-stage schedule: forward and backward of each micro-batch, then one reduction and one step."""
    for micro in range(micro_batches):
        yield Forward(micro)
        yield Backward(micro, last=micro == micro_batches - 1)
    yield ReduceGrads()
    yield Step()


def execute(schedule: Iterable, stage: Stage) -> list[tuple[object, float, float]]:
    """Run `schedule` on `stage`; returns (instruction, begin, end) in `time.monotonic` seconds, in order."""
    spans = []
    for instruction in schedule:
        begin = time.monotonic()
        match instruction:
            case Forward(micro):
                stage.forward(micro)
            case Backward(micro, last):
                stage.backward(micro, last)
            case ReduceGrads():
                stage.reduce_grads()
            case Step():
                stage.step()
            case _:
                raise TypeError(f"{instruction!r} is not an instruction of a one-stage schedule")
        spans.append((instruction, begin, time.monotonic()))
    return spans
