"""The checks of lesson 08 say which slip it was."""
import pytest

from nanoinfra.lab.mutants import collect_lesson_mutants

HINTS = {
    "leaves the others rows as they were": "only your own rows have moved: gather the others'",
    "makes the optimizer anew": "momentum lost: does the optimizer live on in `state`?",
    "forgets the padding": "the last rows stand still: ceil(d0 / N) rows a rank, not floor",
    "takes the gradient of rank 0": "one rank's gradient alone? Sum over the axis",
    "gathers for forward alone": "again when a gradient comes back to the output",
    "gathers rows as they were at first": "the weights of the step before: gather for every use",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("08")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text
