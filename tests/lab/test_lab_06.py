"""Lab 06: it counts what the formulas say, each mistake turns its own rows red; under torchrun too."""
from pathlib import Path

import pytest

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.lab import run_lab

ROOT = Path(__file__).parents[2]
SENT = {"sent_gpipe", "sent_1f1b", "sent_inter", "sent_zb"}


def small():
    """The lab, of fewer and shorter micro-batches than a class has."""
    lab = run_lab.load_lab("06")
    lab.MICROS, lab.LAYERS, lab.SLOT, lab.REPEATS = 4, 8, 0.002, 1
    return lab


def measured(broken):
    import torch.distributed as dist
    return small().measure(Mesh(dp=dist.get_world_size()), "test", broken)


@pytest.mark.parametrize("broken, exposed", [
    ("", set()), ("weights-at-the-end", {"idle_zb", "held_zb"}),
    pytest.param("gpipe-in-disguise", {"held_1f1b"}, marks=pytest.mark.prove),
    pytest.param("padded-messages", SENT, marks=pytest.mark.prove)])
def test_it_counts_what_the_formulas_say_unless_it_is_broken(ranks, broken, exposed):
    lab = small()
    want = lab.expect(2, "test")
    assert set(want) == set(lab.PREDICTIONS)
    for got in ranks(2).run(measured, broken):
        assert {key for key in want if got[key].value != want[key]} == {f"L06.lab_{key}" for key in exposed}
        assert {key for key, m in got.items() if m.kind == "counted"} == set(want)
        for kind in lab.KINDS:                                     # asleep, work takes its time
            least = lab.SLOT * (9 * lab.MICROS + got[f"L06.lab_idle_{kind}"].value)
            assert got[f"L06.lab_step_{kind}"].value >= least


@pytest.mark.prove
@pytest.mark.parametrize("n", [1, 4])
def test_other_numbers_of_stages_too(ranks, n):
    want = small().expect(n, "test")
    for got in ranks(n).run(measured, ""):
        assert {key: got[key].value for key in want} == want


@pytest.mark.parametrize("model", run_lab.load_lab("06").MODELS)
def test_stages_are_equal_for_every_number_of_chunks(model):
    lab = run_lab.load_lab("06")
    for n in (1, 2, 4, 8, 16):
        assert {stop - start for start, stop in split_layers_into_chunks(lab.shape(model), n,
                                                                         lab.T)} == {lab.LAYERS // n}
