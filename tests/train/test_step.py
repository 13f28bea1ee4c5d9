"""The schedule is data; the executor does what it says, in its order, and nothing else."""
from dataclasses import dataclass

import pytest

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
    accumulate,
    schedule,
)
from nanoinfra.train.step import execute


class Recorder:
    """Notes each call as the instruction that asks for it."""

    def __init__(self):
        self.did = []

    def forward(self, micro, chunk):
        self.did.append(Forward(micro, chunk))

    def backward(self, micro, chunk, last):
        self.did.append(Backward(micro, chunk, last))

    def backward_input(self, micro, chunk):
        self.did.append(BackwardInput(micro, chunk))

    def backward_weight(self, micro, chunk, last):
        self.did.append(BackwardWeight(micro, chunk, last))

    def receive(self, message):
        assert isinstance(message, (RecvActivation, RecvGrad))
        self.did.append(message)

    def send(self, message):
        assert isinstance(message, (SendActivation, SendGrad))
        self.did.append(message)

    def reduce_grads(self):
        self.did.append(ReduceGrads())

    def step(self):
        self.did.append(Step())


def test_accumulation_is_forward_backward_each_then_one_reduction_and_one_step():
    assert accumulate(2) == [Forward(0), Backward(0), Forward(1), Backward(1, last=True), ReduceGrads(),
                             Step()]


ORDERS = accumulate(3), schedule("zb-h1", 3, 4)[1], schedule("interleaved", 2, 4, 2)[0]


@pytest.mark.parametrize("order", ORDERS)
def test_executor_runs_the_list_in_order_and_times_it(order):
    stage = Recorder()
    spans = execute(order, stage)
    assert stage.did == order == [what for what, _, _ in spans]
    times = [t for _, begin, end in spans for t in (begin, end)]
    assert times == sorted(times)


def test_an_instruction_it_does_not_know_is_an_error():
    @dataclass(frozen=True)
    class Dance:
        pass
    with pytest.raises(TypeError, match="Dance"):
        execute([Dance()], Recorder())
