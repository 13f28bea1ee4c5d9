"""Execute one training step: a schedule is a list of instructions, and one function runs any schedule.

The same list can be drawn, counted and checked with no process started (parallel/pipeline/simulator.py).
Gradient accumulation over m micro-batches is the schedule of a pipeline with one stage. ShallowSpeed (Boehm
2022) has the idea.
"""
import time
from collections.abc import Iterable
from typing import Protocol

from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
)


class StageProtocol(Protocol):
    """The methods that a schedule's instructions call; TrainStage implements them.

    A schedule of one stage calls only forward, backward, reduce_grads and step.
    """

    def forward(self, micro: int, chunk: int) -> None: ...
    def backward(self, micro: int, chunk: int, is_last: bool) -> None: ...
    def backward_input(self, micro: int, chunk: int) -> None: ...
    def backward_weight(self, micro: int, chunk: int, is_last: bool) -> None: ...
    def start_recv(self, message: RecvActivation | RecvGrad) -> None: ...
    def start_send(self, message: SendActivation | SendGrad) -> None: ...
    def reduce_grads(self) -> None: ...
    def step(self) -> None: ...


def execute_schedule(schedule: Iterable, stage: StageProtocol) -> list[tuple[object, float, float]]:
    """Run the instructions of `schedule` on `stage`, in order.

    Returns (instruction, begin, end) of each, in seconds of `time.monotonic`.
    """
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
                stage.start_recv(instruction)
            case SendActivation() | SendGrad():
                stage.start_send(instruction)
            case ReduceGrads():
                stage.reduce_grads()
            case OptimizerStep():
                stage.step()
            case _:
                raise TypeError(f"{instruction!r} is not an instruction of parallel/pipeline/schedules.py")
        spans.append((instruction, begin, time.monotonic()))
    return spans
