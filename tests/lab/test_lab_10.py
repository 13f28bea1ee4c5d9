"""Lab 10: counts are the formulas' on any number of ranks, and each break turns its own rows red."""
from pathlib import Path

import pytest

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab import run_lab

ROOT = Path(__file__).parents[2]
CUBE = {"cube_tied", "off_cube", "norm_cube"}
prove = pytest.mark.prove


@pytest.mark.parametrize("n, broken, exposed", [
    (2, "", set()),
    pytest.param(2, "one-end", {"deep_tied", "off_deep", "norm_deep"}, marks=prove),
    pytest.param(4, "", set(), marks=prove),
    pytest.param(4, "one-end", {"deep_tied", "off_deep", "norm_deep"} | CUBE, marks=prove),
    pytest.param(2, "counted-twice", {"norm_cut", "norm_deep", "norm_cube"}, marks=prove),
    pytest.param(4, "counted-twice", {"norm_cut", "norm_deep", "norm_cube"}, marks=prove),
    pytest.param(2, "own-tokens", {"off_copies", "norm_copies"}, marks=prove),
    pytest.param(4, "own-tokens", {"off_copies", "norm_copies"}, marks=prove),
    pytest.param(8, "own-tokens", {"off_copies", "norm_copies"} | CUBE - {"cube_tied"}, marks=prove),
    pytest.param(2, "every-micro-batch", {"copies_dp", "deep_tied"}, marks=prove),
    pytest.param(4, "every-micro-batch", {"copies_dp", "deep_tied", "cube_tied"}, marks=prove),
    pytest.param(8, "every-micro-batch", {"deep_tied", "cube_tied", "cube_dp"}, marks=prove)])
def test_it_counts_what_the_formulas_say_unless_it_is_broken(ranks, n, broken, exposed):
    want = small(n, broken).expect(n, "test")
    for got in ranks(n).run(measured, n, broken):
        assert {key for key in want if got[key].value != want[key]} == {f"L10.lab_{key}" for key in exposed}
        assert {key for key, m in got.items() if m.kind == "counted"} == set(want)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_the_formulas_are_those_of_the_handout(n):
    lab = run_lab.load_lab("10")
    want = {key.removeprefix("L10.lab_"): value for key, value in lab.expect(n, "nano").items()}
    psi, (p, d, t) = parameter_count(lab.shape("nano")), lab.meshes(n)["cube"].values()
    stream, ends, loss = 8 * 16 * 64 * 128, 8 * 4096 * 128, 3 * 8 * 16 * 64      # of the step's tokens
    assert p * d * t == n and stream == 2**20 and psi == 2_107_520
    assert want["copies_dp"] == 8 * n * psi * (n > 1)
    assert want["cut_tp"] == n * (34 * stream + loss) * (n > 1)
    assert (want["deep_pp"], want["deep_tied"]) == (2 * (n - 1) * stream, 2 * ends * (n > 1))
    assert want["cube_tp"] == t * (34 * stream + loss) * (t > 1)
    assert want["cube_pp"] == 2 * (p - 1) * t * stream
    norms = 8 * 17 * 128 * (t - 1)
    assert want["cube_dp"] == d * (8 * psi + ends * (p > 1) + norms) * (d > 1)
    assert want["cube_tied"] == 2 * d * ends * (p > 1)


def measured(n, broken):
    return small(n, broken).measure(Mesh(dp=n), "test", broken)


def small(n, broken):
    """The lab, with fewer and shorter sequences; broken, two micro-batches for a data rank, one on 8."""
    lab = run_lab.load_lab("10")
    lab.SEQUENCES, lab.T, lab.STEPS = min(16, 4 * n) if broken else 2 * n, 16, 2         # one warms up
    return lab
