"""The checks of lesson 10 say which slip it was; what they are judged on is one model, cut eight ways."""
import pytest
import torch

from lessons.l10_three_d import cases
from lessons.l10_three_d import checks as check
from nanoinfra.distributed import comm
from nanoinfra.formulas.communication_by_axis import rank_parameter_counts
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.lab.mutants import collect_lesson_mutants

HINTS = {
    "takes the first axis for the fastest": "got {'pp': 1, 'dp': 0, 'tp': 0}: the first axis is the fastest",
    "divides the rank itself each time": "ranks 0 and 2 of {'pp': 2, 'dp': 2, 'tp': 2} both stand at",
    "counts from 1": "place 2 on tp, want one of 0 to 1",
    "leaves out the last axis": "want a dict with a place on pp, dp, tp",
    "takes those side by side": "ranks side by side: so it is on the fastest axis alone",
    "begins with me": "in the axis's own order, from place 0",
    "leaves me out": "got [4], want 2 ranks, 0 among them",
    "sums into the first micro batch": "micro-batch 0's `embed.weight` is overwritten",
    "divides by the micro batches once more": "divided by the micro-batches? The loss was divided by",
    "takes the last micro batch alone": "the last micro-batch alone: add them up",
    "forgets the data ranks": "this data rank's alone: sum over dp",
    "averages over data ranks": "divided by the data ranks? The loss was divided by",
    "forgets norms over tp": "a norm has seen this rank's tokens alone: sum over tp",
    "averages norms over tp": "a norm's parts averaged over tp? They are parts of a sum",
    "sums matrices over tp": "a matrix summed over tp? Every rank has rows or heads of its own",
    "forgets the tied weight": "one end's use alone: sum the tied weight over `ends`",
    "sums the tied weight twice": "2 x (48 of 48): summed over `ends` twice?",
    "forgets the names of norms": "the names are not those given: blocks.0.norm1.weight",
    "sums each micro batch over dp": "after each micro-batch? Add them up first, then send the sum",
    "sums twice and halves": "sends 768 bytes on pp, want 384: which parameters does this axis have to sum?",
    "forgets the other stages": "this stage's alone: sum the squares over pp",
    "forgets the other tensor ranks": "this tensor rank's alone: sum the squares over tp",
    "gives a tensor": "want a float: no return, or no .item()?",
    "squares in place": "`embed.weight` is overwritten, and the optimizer's to use",
    "counts norms on every tp rank": "norms' weights are on all tp ranks alike: count them on one",
    "forgets the root": "want 121.9234565, got 14865.32926: the sum of squares, without its root",
    "counts the tied weight at both ends": "the tied weight is at both ends of the pipe: count it at one",
    "sums over data ranks too": "all dp ranks hold the same gradient: no sum over dp",
    "counts both as often as they are there": "norms count on every tp rank, the tied weight at both ends",
    "squares in float32": "rounding: squared in a narrower dtype?",
    "sends a number for each tensor": "sends 160 bytes in 20 calls; want 8 on tp and 8 on pp",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("10")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text


def lets_the_stages_between_wait(micro, mesh, ends):
    if ends is None:
        comm.all_reduce(torch.zeros(1), mesh.pp)
    return {}


@pytest.mark.prove                                               # takes as long as the pool has patience
def test_a_rank_that_waits_for_ever_is_explained():
    failure = check.sum_gradients.report(lets_the_stages_between_wait).first_failure
    assert "stages between the ends have no tied weight, and `ends` is None there" in failure.text


@pytest.mark.parametrize("sizes", cases.MESHES)
def test_the_cases_are_cut_as_the_formulas_say(sizes):
    p, _, t = sizes
    for stage in range(p):
        got = {name: cases.total(name, sizes, 0).numel() for name in cases.names(p, stage)}
        assert got == rank_parameter_counts(cases.CONFIG, p, t, stage)


def test_the_norm_of_the_cases_is_one_model_s_whatever_the_mesh_cuts():
    one = torch.stack([cases.total(name, (1, 1, 1),
                                   0).norm() for name in parameter_shapes(cases.CONFIG)]).norm().item()
    assert cases.norm((1, 1, 1)) == pytest.approx(one, rel=1e-12)
    assert cases.norm((4, 1, 1)) == pytest.approx(one, rel=1e-12)
    assert all(abs(value / cases.norm((2, 2, 2)) - 1) > 1e-9
               for value in cases.norm_slips((2, 2, 2), (0, 0, 0)).values())
