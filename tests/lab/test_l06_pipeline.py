"""The checks of lesson 06 say which slip it was."""
import pytest

from lessons.l06_pipeline import checks as check
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.parallel.pipeline.schedules import one_f_one_b, zb_h1

HINTS = {
    "is gpipe": "all forwards first, as GPipe? Stage r goes p - 1 - r forwards ahead",
    "waits for each to come back": "idles 12.0 slots, want 3: too few forwards ahead?",
    "goes r ahead": "nobody can go on: (0, Backward",
    "goes one ahead too few": "too few forwards ahead? Those behind need work",
    "goes one ahead too many": "stage 0 of 2, 4 micro-batches: holds 3 at once, want 2",
    "goes p ahead everywhere": "stage 1 of 2, 4 micro-batches: holds 2 at once, want 1",
    "forgets that m may be small": "micro-batches are 0 to 0: fewer than stages behind?",
    "sends back before it goes forward": "micro-batch 0 goes Backward, then Forward; want Forward",
    "turns round on odd stages": "waits for [(1, SendGrad(micro_batch=0",
    "misses the last micro batch": "micro-batch 3 goes nowhere",
    "forgets to drain": "micro-batch 3 goes Forward; want Forward, then Backward",
    "returns nothing": "want computations one after another: no yield?",
    "never puts off": "weights put off too little? Whoever works at them lets the next gradient wait",
    "puts all off to the end": "weights put off too long? 1F1B holds p - r on stage r, so r are left",
    "puts off by p everywhere": "stage 0 of 2, 4 micro-batches: holds 3 at once, want 2",
    "forgets what it put off": "micro-batch 3 goes Forward, then BackwardInput; want",
    "does weights first": "micro-batch 0 goes Forward, then BackwardWeight, then BackwardInput",
    "does not split": "is none of Forward, BackwardInput, BackwardWeight",
    "takes them one at a time": "computation 1 is Backward(0), want Forward(1), the order's",
    "runs all forwards first": "computation 2 is Forward(2), want Backward(0)",
    "never lets go": "3 micro-batches are alive at once, the order needs 1: kept after their backward?",
    "sends the stream back": "right on the stages behind: is x.grad what they send back?",
    "sends no gradient": "still zero: never filled",
    "divides what comes back": "divided by the micro-batches? The loss is divided already",
    "forgets earlier micro batches": "of the last alone?",
    "sends everything twice": "6,912 bytes in 3 messages, want 3,456 in 3",
}
SLOW = {
    "gives no history": "It has no history: .requires_grad_() it first",
    "sends in float32": "rounding: summed in a narrower dtype?",
    "waits for all after each": "one stage at a time: who waits for whom, without need?",
    "waits for every send": "send with async_op=True and wait for all of them at the end",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("06")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text


@pytest.mark.prove
@pytest.mark.parametrize("name", SLOW)
def test_a_slip_that_ends_the_ranks_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert SLOW[name] in failure.text


def test_the_real_schedules_pass():
    assert check.one_f_one_b.report(one_f_one_b).exit_code == 0
    assert check.zero_bubble.report(zb_h1).exit_code == 0


def test_a_function_that_yields_something_else_is_told_so():
    report = check.one_f_one_b.report(lambda p, r, m: ["forward"] * m)
    assert "'forward' is none of Forward, Backward" in report.first_failure.text
