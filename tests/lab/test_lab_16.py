"""Lab 16: counts are the formulas' on any number of ranks, and each break turns its own rows red."""
from pathlib import Path

import pytest

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas import paged_kv_memory
from nanoinfra.lab import run_lab

ROOT = Path(__file__).parents[2]
PROMPTLY = {f"{what}_{way}" for what in ("steps", "calls") for way in ("orca", "pages")}
BYTES = {"bytes_static", "bytes_orca", "bytes_pages"}
prove = pytest.mark.prove


def small():
    """The lab, of fewer requests than a class has, each served once."""
    lab = run_lab.load_lab("16")
    lab.JOBS, lab.REPEATS = lab.JOBS[:10], 1
    lab.TRACE = lab.trace_sizes(lab.JOBS)
    return lab


def measured(broken):
    import torch.distributed as dist
    return small().measure(Mesh(dp=dist.get_world_size()), "test", broken)


@pytest.mark.parametrize("n, broken, exposed", [
    (1, "", set()), (2, "", set()), pytest.param(2, "no-cache", BYTES, marks=prove),
    pytest.param(2, "all-heads", {"memory"}, marks=prove),
    pytest.param(2, "batches-after-all", PROMPTLY, marks=prove),
    pytest.param(2, "coarse-blocks", {"waste_pages"}, marks=prove),
    pytest.param(1, "batches-after-all", {"steps_orca", "steps_pages"}, marks=prove),
    pytest.param(1, "coarse-blocks", {"waste_pages"}, marks=prove),
    pytest.param(4, "all-heads", {"memory"}, marks=prove), pytest.param(4, "", set(), marks=prove),
    pytest.param(8, "", set(), marks=prove), pytest.param(8, "no-cache", BYTES, marks=prove)])
def test_it_counts_what_the_formulas_say_unless_it_is_broken(ranks, n, broken, exposed):
    lab = small()
    want = lab.expect(n, "test")
    assert set(want) == set(lab.PREDICTIONS)
    for got in ranks(n).run(measured, broken):
        assert {key for key in want if got[key].value != want[key]} == {f"L16.lab_{key}" for key in exposed}
        assert {key for key, m in got.items() if m.kind == "counted"} == set(want)
        assert {key for key, m in got.items() if m.kind == "timed"} == {
            f"L16.lab_speed_{way}" for way in lab.WAYS}


def test_nobody_waits_for_a_page_be_blocks_as_large_again():
    lab = run_lab.load_lab("16")
    for size in (lab.SIZE, 2 * lab.SIZE):
        assert paged_kv_memory.peak_blocks_in_use(lab.TRACE, size) <= lab.PLACES // size


def test_the_numbers_of_the_handout():
    lab, text = run_lab.load_lab("16"), (ROOT / "lessons" / "l16_paging" / "handout.md").read_text()
    for n in (1, 2, 4, 8):
        want = {key.removeprefix("L16.lab_"): value for key, value in lab.expect(n, "nano").items()}
        for key, value in want.items():
            assert f"{value:,}" in text, (n, key)


@pytest.mark.parametrize("model", run_lab.load_lab("16").MODELS)
def test_every_size_can_be_cut_eight_times(model):
    from nanoinfra.formulas.tensor_parallel import check_tp_fits_model
    for n in (1, 2, 4, 8):
        check_tp_fits_model(run_lab.load_lab("16").shape(model), n)
