"""The schedule is data; the executor does what it says, in its order, and nothing else."""
from dataclasses import dataclass

import pytest

from nanoinfra.train.step import Backward, Forward, ReduceGrads, Step, accumulate, execute


class Recorder:
    def __init__(self):
        self.did = []

    def forward(self, micro):
        self.did.append(("forward", micro))

    def backward(self, micro, last):
        self.did.append(("backward", micro, last))

    def reduce_grads(self):
        self.did.append("reduce")

    def step(self):
        self.did.append("step")


def test_accumulation_is_forward_backward_each_then_one_reduction_and_one_step():
    assert list(accumulate(2)) == [Forward(0), Backward(0), Forward(1), Backward(1, last=True),
                                   ReduceGrads(), Step()]


@pytest.mark.parametrize("m", [1, 3])
def test_executor_runs_the_list_in_order_and_times_it(m):
    stage = Recorder()
    spans = execute(accumulate(m), stage)
    each = [x for i in range(m) for x in (("forward", i), ("backward", i, i == m - 1))]
    assert stage.did == [*each, "reduce", "step"]
    assert [what for what, _, _ in spans] == list(accumulate(m))
    times = [t for _, begin, end in spans for t in (begin, end)]
    assert times == sorted(times)


def test_an_instruction_it_does_not_know_is_an_error():
    @dataclass(frozen=True)
    class Dance:
        pass
    with pytest.raises(TypeError, match="Dance"):
        execute([Dance()], Recorder())
