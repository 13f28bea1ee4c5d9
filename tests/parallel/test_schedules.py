"""Schedules are lists: what is in them, what a validator finds wrong with them, what is refused."""
from itertools import product

import pytest

from nanoinfra.formulas import pipeline
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
    build_pipeline_schedule,
    forward_only_schedule,
)
from nanoinfra.parallel.pipeline.simulator import max_micro_batches_in_flight, validate_schedule

KINDS = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("interleaved", 3)]


def grid(stages=range(1, 7), micros=range(1, 10)):
    """Every schedule there is."""
    for p, m, (kind, v) in product(stages, micros, KINDS):
        if (kind != "interleaved" or (m % p == 0 and p > 1)) and (kind != "zb-h1" or p > 1):
            yield kind, p, m, v


def test_every_schedule_is_one_that_stages_can_carry_out():
    for case in grid():
        validate_schedule(build_pipeline_schedule(*case))


def test_micro_batches_in_flight_are_the_papers():
    for kind, p, m, v in grid():
        got = [max_micro_batches_in_flight(order) for order in build_pipeline_schedule(kind, p, m, v)]
        want = [pipeline.predicted_micro_batches_in_flight(kind, p, r, m, v) for r in range(p)]
        assert got == want, (kind, p, m, v)


def test_messages_are_as_many_as_the_formula_says():
    from nanoinfra.config import config_for_size
    config = config_for_size("test")
    for kind, p, m, v in grid():
        sends = [sum(isinstance(what, (SendActivation, SendGrad)) for what in order)
                 for order in build_pipeline_schedule(kind, p, m, v)]
        assert [n * 2 * 9 * 32 * 4 for n in sends] == pipeline.pipeline_sent_bytes_per_stage(config, p, m, 2,
                                                                                             9, 4, v)


def test_1f1b_in_words():
    first, second = build_pipeline_schedule("1f1b", 2, 2)
    assert first == [RecvGrad(0), Forward(0), SendActivation(0), RecvGrad(1), Forward(1), SendActivation(1),
                     Backward(0), Backward(1, is_last=True), ReduceGrads(), OptimizerStep()]
    assert second == [RecvActivation(0), RecvActivation(1), Forward(0), Backward(0), SendGrad(0), Forward(1),
                      Backward(1, is_last=True), SendGrad(1), ReduceGrads(), OptimizerStep()]


def test_zero_bubble_puts_weights_off_by_the_stages_number():
    work = (Forward, BackwardInput, BackwardWeight)
    second = [what for what in build_pipeline_schedule("zb-h1", 3, 3)[1] if isinstance(what, work)]
    assert second == [Forward(0), Forward(1), BackwardInput(0), Forward(2), BackwardInput(1),
                      BackwardWeight(0), BackwardInput(2), BackwardWeight(1), BackwardWeight(2, is_last=True)]


def test_evaluation_only_goes_forward():
    assert forward_only_schedule(2)[0] == [Forward(0), SendActivation(0)]
    assert forward_only_schedule(2)[1] == [RecvActivation(0), Forward(0)]
    assert [what.chunk for what in forward_only_schedule(2, 2)[0] if isinstance(what, Forward)] == [0, 1]


@pytest.mark.parametrize("case, rule", [
    (("interleaved", 4, 6, 2), "pp 4 does not divide 6; try 8 micro-batches"),
    (("interleaved", 1, 4, 2), "two stages and two chunks"),
    (("interleaved", 2, 4, 1), "two stages and two chunks"),
    (("1f1b", 2, 4, 2), "interleaved schedule's"),
    (("zb-h1", 1, 4), "one stage has none"),
    (("bfs", 2, 4), "one of gpipe, 1f1b, interleaved, zb-h1")])
def test_what_does_not_exist_is_refused_with_the_rule(case, rule):
    with pytest.raises(ValueError, match=rule):
        build_pipeline_schedule(*case)


def without(what):
    return lambda lists: [[x for x in order if x != what] for order in lists]


def swapped(a, b):
    """Both stand in each other's place on the stage that has them."""
    return lambda lists: [[{a: b, b: a}.get(x, x) for x in order] if a in order and b in order else order
                          for order in lists]


@pytest.mark.parametrize("wrong, said", [
    (without(RecvActivation(1)), "has no RecvActivation"),
    (without(SendGrad(0)), "which never leave"),
    (without(RecvGrad(2)), "has no RecvGrad"),
    (without(Backward(1)), r"micro-batch 1 through chunk 0 as \['Forward'\]"),
    (without(Forward(0)), "as .'Backward'.|has not made"),
    (without(ReduceGrads()), "not with ReduceGrads and OptimizerStep"),
    (swapped(Backward(0), Forward(0)), "as .'Backward', 'Forward'.|has no RecvGrad"),
    (swapped(SendActivation(0), SendActivation(1)), "has not made|is ready"),
    (swapped(RecvActivation(1), RecvActivation(2)), "is ready|has no Recv"),
    (lambda lists: [[*order[:1], *order] for order in lists], "twice"),
    (lambda lists: [[Backward(0, is_last=True) if x == Backward(0) else x for x in order] for order in lists],
     "last")])
def test_the_validator_finds(wrong, said):
    lists = build_pipeline_schedule("1f1b", 2, 3)
    validate_schedule(lists)
    with pytest.raises(ValueError, match=said):
        validate_schedule(wrong(lists))


def test_the_validator_finds_a_circle_of_blocking_sends():
    """Each stage would send before the place for what comes is ready: fine where sends do not block."""
    lists = build_pipeline_schedule("1f1b", 2, 3)
    late = [[], []]
    for r, order in enumerate(lists):
        for what in order:
            if isinstance(what, (RecvActivation, RecvGrad)):
                continue
            if isinstance(what, Forward) and r == 1:
                late[r].append(RecvActivation(what.micro_batch))
            if isinstance(what, Backward) and r == 0:
                late[r].append(RecvGrad(what.micro_batch))
            late[r].append(what)
    with pytest.raises(ValueError, match="nobody can go on"):
        validate_schedule(late)
