"""Lab 06: it counts what the formulas say, each mistake turns its own rows red; under torchrun too."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoinfra.dist.mesh import Mesh
from nanoinfra.formulas.pipeline import split
from nanoinfra.lab import run
from nanoinfra.lab.predict import predict

ROOT = Path(__file__).parents[2]
SENT = {"sent_gpipe", "sent_1f1b", "sent_inter", "sent_zb"}


def small():
    """The lab, of fewer and shorter micro-batches than a class has."""
    lab = run.find("06")
    lab.MICROS, lab.LAYERS, lab.SLOT, lab.REPEATS = 4, 8, 0.002, 1
    return lab


def measured(broken):
    import torch.distributed as dist
    return small().measure(Mesh(dp=dist.get_world_size()), "test", broken)


def test_it_takes_predictions_beside_those_of_its_lesson(course, capsys):
    for key, unit in run.find("06").PREDICTIONS.items():
        predict(key, 1, unit)
    assert run.main(["06", "--check"]) == 0
    assert "12 of 12 predictions made" in capsys.readouterr().out


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


@pytest.mark.parametrize("model", run.find("06").MODELS)
def test_stages_are_equal_for_every_number_of_chunks(model):
    lab = run.find("06")
    for n in (1, 2, 4, 8, 16):
        assert {stop - start for start, stop in split(lab.shape(model), n, lab.T)} == {lab.LAYERS // n}


@pytest.mark.prove
@pytest.mark.timeout(300)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_under_torchrun_it_prints_once_and_hands_in(course, n):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
               "-m", "nanoinfra.lab.run", "06"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 of 12 predictions made") == 1
    handed = json.loads((course / "work" / "lab06.json").read_text())
    assert list(handed["runs"]) == [f"nano on {n} rank{'s' if n > 1 else ''}, cpu"]
