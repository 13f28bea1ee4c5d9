"""A step is a schedule, and a schedule is data: one executor runs the instructions of any of them.

The same list can be drawn, counted and checked with no process started (parallel/pipeline/simulator.py).
Accumulation over m micro-batches is the schedule of a pipeline with one stage. ShallowSpeed (Boehm 2022) has
the idea.
"""
import time
from collections.abc import Iterable
from typing import Protocol

from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    Step,
)


class Stage(Protocol):
    """What the executor drives. A schedule of one stage calls forward, backward, reduce_grads and step."""

    def forward(self, micro: int, chunk: int) -> None: ...
    def backward(self, micro: int, chunk: int, last: bool) -> None: ...
    def backward_input(self, micro: int, chunk: int) -> None: ...
    def backward_weight(self, micro: int, chunk: int, last: bool) -> None: ...
    def receive(self, message: RecvActivation | RecvGrad) -> None: ...
    def send(self, message: SendActivation | SendGrad) -> None: ...
    def reduce_grads(self) -> None: ...
    def step(self) -> None: ...


def execute(schedule: Iterable, stage: Stage) -> list[tuple[object, float, float]]:
    """Run `schedule` on `stage`; returns (instruction, begin, end) in `time.monotonic` seconds, in order."""
    spans = []
    for instruction in schedule:
        begin = time.monotonic()
        match instruction:
            case Forward(micro, chunk):
                stage.forward(micro, chunk)
            case Backward(micro, chunk, last):
                stage.backward(micro, chunk, last)
            case BackwardInput(micro, chunk):
                stage.backward_input(micro, chunk)
            case BackwardWeight(micro, chunk, last):
                stage.backward_weight(micro, chunk, last)
            case RecvActivation() | RecvGrad():
                stage.receive(instruction)
            case SendActivation() | SendGrad():
                stage.send(instruction)
            case ReduceGrads():
                stage.reduce_grads()
            case Step():
                stage.step()
            case _:
                raise TypeError(f"{instruction!r} is not an instruction of parallel/pipeline/schedules.py")
        spans.append((instruction, begin, time.monotonic()))
    return spans
