"""The checks of lesson 16 say which slip it was."""
import sys

import pytest

from lessons.l16_paging import cases
from lessons.l16_paging import checks as check
from nanoinfra.lab.mutants import collect_lesson_mutants

HINTS = {
    "leaves it among the free": "want each of 0, 1, 2 once: still among the free?",
    "counts no holder": "three blocks are taken and have [0, 0, 0] holders",
    "frees what others read": "is free, and a sequence reads it still",
    "never frees": "and it is not free: lost for ever",
    "gives back the first alone": "a sequence that held both is gone",
    "writes where others read": "who is to write into it still has it in its table",
    "copies always": "want None and no other block: nothing is to be copied",
    "copies the wrong way": "which block to copy, and where to",
    "copies the whole table": "place 0 of the table changed, and place 1 was to be written",
    "gives back before it takes": "want [0] and 2: take before you give back",
    "takes back twice": "a block given back twice: returned None, want ValueError",
    "empties the table": "is given back and is [] now: it stays as it is",
    "says value error where none is free": "ValueError: full, want IndexError",
    "shares for two": "has 5 holders, want 4",
    "spends nothing": "is what is left of the budget less each time?",
    "begins at 0": "begins at token 0, and 8 of its tokens are computed",
    "counts for itself": "plan adds nothing to `num_computed_tokens`, whoever runs the step does",
    "takes nobody out": "plan does not end: is who is sent away taken out of `running`?",
    "goes on with who was sent away": "it was sent away in this step, so plan it no more",
    "asks nobody for room": "no block is free: where too few are, one that runs sends the last away",
    "sends others away for who waits": "[10] sent away, and all that run have room: nobody who waits sends",
    "puts new ones at the front": "leaves the front of `waiting` for the end of `running`",
    "leaves them in the queue": "is planned and waits: move it from waiting to running",
    "returns nothing": "want a list of (sequence, first token, how many): no return?",
    "takes a block too few": "as many as it lacks for this step's tokens",
    "keeps its table": "given back and not taken out of the table?",
    "lets new ones in first": "those who run come first, in theirs",
    "lets the first that fits in": "[5] come in, want the first 1 of [4, 5, 6]: nobody overtakes",
    "lets somebody in at once": "for want of room [10] must go, and [10] come in, in one step",
    "sends the first away": "[5] sent away, want [11]: the last of the running",
    "skips who finds no room": "nobody sent away, want [11]",
    "puts who was sent away last": "they came before all that wait",
    "keeps what is computed": "its blocks are somebody else's now, so 0 and []",
    "takes one token each": "a prompt goes in as large a chunk as the budget allows",
    "lets nobody in again": "3 are left after 88 steps, the real one takes 44: is everybody let in again?",
    "lets in again a step late": "all are done after 42 steps; it must be 44, the real one's",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("16")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text
    assert failure.criterion.name == MUTANTS[name].rejected_by


def test_a_plan_runs_untraced_afterwards():
    before = sys.gettrace()
    check.plan.report(MUTANTS["takes nobody out"].variant)
    assert sys.gettrace() is before


@pytest.mark.parametrize("error", [NotImplementedError, NameError("name 'deque' is not defined")])
def test_what_is_not_written_or_not_imported_is_no_wrong_exception(error):
    class Pool(type(MUTANTS["empties the table"].variant(1, 1)).__base__):
        def allocate(self):
            if self.free_blocks:
                return super().allocate()
            raise error
    text = check.Pool.report(Pool).first_failure.text
    assert text == "not written yet" if error is NotImplementedError else "import inside" in text


def test_every_criterion_has_a_mutant_of_its_own():
    want = {criterion.name for judge in check.CHECKS for criterion in judge.criteria}
    assert {mutant.rejected_by for mutant in MUTANTS.values()} == want


def test_the_moments_are_of_all_kinds():
    moments = cases.moments()
    assert sum(bool(moment.sent_away) for moment in moments) > 20
    assert any(len(moment.sent_away) > 1 for moment in moments)
    assert sum(bool(moment.sent_away and moment.waiting) for moment in moments) > 20
    chunks = [moment for moment in moments for who, _, count in moment.want
              if 1 < count < len(next(s for s, name in moment.names.items() if name == who).tokens)]
    assert len(chunks) > 20 and all(moment.want for moment in moments)


def test_to_judge_changes_no_moment():
    before = [(str(moment), [s.block_table for s in moment.running]) for moment in cases.moments()]
    check.plan.report(MUTANTS["spends nothing"].variant)
    assert before == [(str(moment), [s.block_table for s in moment.running]) for moment in cases.moments()]
