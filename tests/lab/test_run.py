"""The lab runner: what it refuses, what it prints and hands in, and the labs on several ranks."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.lab import run_lab
from nanoinfra.lab.predict import predict

ROOT = Path(__file__).parents[2]
LABS = [("06", 12), ("07", 12), ("08", 8), ("10", 8), ("16", 12)]           # and how many predictions
LAB = '''
from nanoinfra.lab.measure import counted, median_of_times
from nanoinfra.distributed import comm

PREDICTIONS = {"L77.bytes": "B", "L77.more": "B"}
QUESTIONS = ("Why?", "And then?")
BREAKS = ("doubled", "harmless")
MODELS = ("nano", "test")

def expect(n, model):
    return {"L77.bytes": 10 * n}

def measure(mesh, model, broken):
    if broken == "harmless" and mesh.rank == mesh.world.size - 1 > 0:
        raise RuntimeError("the dog ate it")
    comm.barrier(mesh.data)
    size = 10 * mesh.world.size * (2 if broken == "doubled" else 1)
    seconds = median_of_times([0.1, 0.2, 0.4])
    return {"L77.bytes": counted(size, "B"), "L77.more": counted(7, "B"), "L77.step": seconds}
'''


@pytest.fixture
def lab(course):
    """A lab of three numbers, in an otherwise empty course."""
    folder = course / "lessons" / "l77_toy"
    folder.mkdir()
    (folder / "lab.py").write_text(LAB)
    return course / "work" / "lab77.json"


def test_the_table_and_the_hand_in_hold_prediction_and_measurement(lab, capsys):
    predict("L77.bytes", 11, "B")
    predict("L77.bytes", 10, "B")
    assert run_lab.main(["77"]) == 0
    out = capsys.readouterr().out
    bytes_, more, step = (next(line for line in out.splitlines() if key in line)
                          for key in ("│ L77.bytes", "│ L77.more", "│ L77.step"))
    assert "10 B" in bytes_ and "pass" in bytes_ and "counted" in bytes_
    assert "not made" in more and "7 B" in more and "missing" in more
    assert "200 ms" in step and "timed" in step and "shown" in step
    assert "1 of 2 predictions made, 1 of them exact" in out
    got = json.loads(lab.read_text())
    done = got["runs"]["nano on 1 rank, cpu"]
    numbers = done["numbers"]
    assert (got["lab"], done["ranks"], bool(done["machine"])) == ("77", 1, True)
    assert numbers["L77.bytes"]["predicted"] == 10 and numbers["L77.bytes"]["measured"]["value"] == 10
    assert numbers["L77.more"]["predicted"] is None
    assert got["sentences"] == {"Why?": "", "And then?": ""}


def test_a_prediction_that_missed_is_no_failure(lab, capsys):
    predict("L77.bytes", 11, "B")
    assert run_lab.main(["77"]) == 0
    assert "miss" in next(line for line in capsys.readouterr().out.splitlines() if "│ L77.bytes" in line)


def test_sentences_and_earlier_runs_stay(lab):
    run_lab.main(["77"])
    handed = json.loads(lab.read_text())
    handed["sentences"]["Why?"] = "Because."
    lab.write_text(json.dumps(handed))
    run_lab.main(["77", "--model", "test"])
    run_lab.main(["77", "--break", "doubled"])
    got = json.loads(lab.read_text())
    assert got["sentences"] == {"Why?": "Because.", "And then?": ""}
    assert list(got["runs"]) == ["nano on 1 rank, cpu", "test on 1 rank, cpu", "nano on 1 rank, cpu, doubled"]


def test_a_break_is_held_against_the_formula_and_must_be_exposed(lab, capsys):
    assert run_lab.main(["77", "--break", "doubled"]) == 0
    out = capsys.readouterr().out
    assert "formula" in out and "doubled: exposed by L77.bytes" in out
    assert run_lab.main(["77", "--break", "harmless"]) == 1
    assert "nothing here exposes it" in capsys.readouterr().out


def test_a_count_that_is_not_the_formulas_fails(lab, capsys):
    file = lab.parents[1] / "lessons" / "l77_toy" / "lab.py"
    file.write_text(file.read_text().replace("10 * n", "9 * n"))
    assert run_lab.main(["77"]) == 1
    assert "The code is wrong, not you: L77.bytes" in capsys.readouterr().out


def test_check_says_what_is_missing_and_runs_nothing(lab, capsys):
    predict("L77.more", 3, "B")
    capsys.readouterr()
    assert run_lab.main(["77", "--check"]) == 0
    assert capsys.readouterr().out == "lab 77: 1 of 2 predictions made; missing: L77.bytes\n"
    assert not lab.exists()


@pytest.mark.parametrize("argv, said", [
    (["76"], "there is no lab '76', but 77 in lessons; run this"),
    (["77", "--break", "x"], "lab 77 knows no break 'x'; there are doubled, harmless"),
    (["77", "--model", "huge"], "lab 77 knows no model 'huge'; there are nano, test"),
    (["77", "--nproc", "0"], "--nproc 0 is too small; give at least 1"),
    (["77", "--nproc", "2", "--break", "x"], "lab 77 knows no break 'x'"),
    ([], "make lab L=08 N=4"),
])
def test_a_mistake_is_one_line(lab, capsys, argv, said):
    assert run_lab.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_on_several_ranks_it_is_its_own_launcher(lab, capsys, monkeypatch):
    """Whose store is on loopback, as torchrun's is not; a rank starts no further ones."""
    argv, begun = ["77", "--nproc", "2", "--model", "test"], []
    monkeypatch.setattr("nanoinfra.train.launch.launch_ranks.launch_ranks",
                        lambda *how, **more: begun.append((how, more)) or 5)
    assert run_lab.main(argv) == 5
    assert begun == [((argv, 2), {"module": "nanoinfra.lab.run_lab"})]
    assert capsys.readouterr().out.startswith("lab 77: 0 of 2 predictions made; missing: ")
    monkeypatch.setattr(run_lab, "is_launched_rank", lambda: True)
    assert run_lab.main(argv) == 0 and len(begun) == 1


def test_what_cannot_be_compared_is_refused_before_anything_runs(lab, capsys):
    predict("L77.bytes", 1, "kB")
    assert run_lab.main(["77"]) == 2
    assert "L77.bytes was predicted in 'kB' and is measured in 'B'" in capsys.readouterr().err
    predict("L77.bytes", 1, "B")
    lab.write_text("{")
    assert run_lab.main(["77"]) == 2
    assert "work/lab77.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("number, n", LABS)
def test_a_lab_takes_predictions_beside_those_of_its_lesson(course, capsys, number, n):
    for key, unit in run_lab.load_lab(number).PREDICTIONS.items():
        predict(key, 1, unit)
    assert run_lab.main([number, "--check"]) == 0
    assert f"{n} of {n} predictions made" in capsys.readouterr().out


@pytest.mark.parametrize("broken, exposed", [
    pytest.param("", set(), marks=pytest.mark.prove), ("norms-apart", {"grads_keep", "grads_gather"}),
    pytest.param("column-without-sum", {"calls_none", "bytes_none", "ends_none"}, marks=pytest.mark.prove),
    pytest.param("kept-after-all", {"calls_gather", "bytes_gather", "ends_gather", "kept_gather"},
                 marks=pytest.mark.prove)])
def test_lab_07_counts_what_the_formulas_say_unless_it_is_broken(ranks, broken, exposed):
    want = run_lab.load_lab("07").expect(2, "test")
    for got in ranks(2).run(measured, "07", broken):
        assert {key for key in want if got[key].value != want[key]} == {f"L07.lab_{key}" for key in exposed}
        assert {key for key, m in got.items() if m.kind == "counted"} == set(want)
        if not broken:
            assert 0 < got["L07.lab_wait_none"].value < got["L07.lab_net_none"].value


@pytest.mark.parametrize("broken, exposed", [
    ("", set()), ("unsharded-optimizer", {"held_1", "sent_1"}),
    pytest.param("gradients-kept", {"held_2", "sent_2"}, marks=pytest.mark.prove),
    pytest.param("never-freed", {"held_3"}, marks=pytest.mark.prove)])
def test_lab_08_counts_what_the_formulas_say_unless_it_is_broken(ranks, broken, exposed):
    want = run_lab.load_lab("08").expect(2, "test")
    for got in ranks(2).run(measured, "08", broken):
        assert {key for key in want if got[key].value != want[key]} == {f"L08.lab_{key}" for key in exposed}
        assert {m.kind for key, m in got.items() if "step" not in key} == {"counted"}


LAUNCHER = ["-m", "nanoinfra.lab.run_lab", "--nproc"]                  # as make lab starts it
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.mark.prove
@pytest.mark.parametrize("start", [LAUNCHER, TORCHRUN], ids=["launcher", "torchrun"])
def test_a_rank_that_fails_says_so_in_one_line(lab, start):
    done = on_ranks(start, 2, lab, "77", "--break", "harmless")
    said = [line for line in done.stderr.splitlines() if line.startswith("lab 77: rank 1 of 2 failed")]
    assert done.returncode == 1
    assert said == ["lab 77: rank 1 of 2 failed, RuntimeError: the dog ate it "
                    "(the traceback is in work/lab77_rank1.txt)"]
    assert "the dog ate it" in (lab.parent / "lab77_rank1.txt").read_text()


@pytest.mark.prove
@pytest.mark.timeout(300)
@pytest.mark.parametrize("start, n", [*((LAUNCHER, n) for n in (1, 2, 4, 8)), (TORCHRUN, 2)],
                         ids=["1", "2", "4", "8", "torchrun"])
@pytest.mark.parametrize("number, asked", LABS)
def test_a_lab_on_ranks_prints_once_and_hands_in(course, number, asked, start, n):
    file = course / "work" / f"lab{number}.json"
    done = on_ranks(start, n, file, number)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"0 of {asked} predictions made, 0 of them exact") == 1
    assert list(json.loads(file.read_text())["runs"]) == [f"nano on {n} rank{'s' if n > 1 else ''}, cpu"]


def measured(number, broken):
    import torch.distributed as dist
    lab = run_lab.load_lab(number)
    lab.STEPS = 2                                      # one to warm up, one that counts
    return lab.measure(Mesh(dp=dist.get_world_size()), "test", broken)


def on_ranks(start, n, file, *argv):
    """A lab on `n` ranks, in the course that `file` is to be handed in from."""
    module = ["-m", "nanoinfra.lab.run_lab"] if start is TORCHRUN else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *start, str(n), *module, *argv], cwd=file.parents[1],
                          env=environment, capture_output=True, text=True, timeout=280)
