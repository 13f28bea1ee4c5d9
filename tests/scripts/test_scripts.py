"""Each script is one file that runs alone and under torchrun, and its losses are the command line's."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.train import metrics_and_plots

ROOT = Path(__file__).resolve().parents[2]
SAME = ["--steps", "3", "--seq", "32", "--global-batch", "6", "--dtype", "float64"]
SCRIPTS = {
    "data_parallel.py": (["--lr", "0.5"], ["--optimizer", "sgd", "--lr", "0.5", "--lr-schedule", "constant",
                                           "--warmup", "0", "--clip", "0"]),
    "pipeline.py": ([], ["--lr-schedule", "constant", "--warmup", "0"]),
    "tensor_parallel.py": ([], ["--lr-schedule", "constant", "--warmup", "0"]),
    "three_d.py": ([], ["--lr-schedule", "constant", "--warmup", "0"]),
    "train_gpt.py": (["--size", "test", "--data", "random", "--micro-batch", "2"], ["--micro-batch", "2"]),
    "zero.py": (["--stage", "3"], ["--lr-schedule", "constant", "--warmup", "0", "--zero", "3"]),
}


@pytest.mark.parametrize("script, world, more", [
    ("train_gpt.py", 1, []),
    pytest.param("pipeline.py", 2, ["--schedule", "zb-h1"], marks=pytest.mark.prove)])
def test_losses_are_the_command_lines(tmp_path, script, world, more):
    own, theirs = SCRIPTS[script]
    main(["train", "--model", "test", "--data", "random", "--out", str(tmp_path), "--threads", "1",
          *SAME, *theirs])
    want = [line["loss"] for line in metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl")]
    assert losses(script, world, [*SAME, *own, *more]) == pytest.approx(want, abs=1e-9)


@pytest.mark.prove
@pytest.mark.parametrize("script, world, more", [
    ("data_parallel.py", 1, []), ("data_parallel.py", 2, []), ("data_parallel.py", 4, []),
    ("pipeline.py", 1, []), ("pipeline.py", 2, ["--schedule", "gpipe", "--micro-batches", "3"]),
    ("pipeline.py", 4, []), ("pipeline.py", 2, ["--schedule", "interleaved", "--chunks", "2"]),
    ("tensor_parallel.py", 1, []), ("tensor_parallel.py", 2, ["--tp", "2"]),
    ("tensor_parallel.py", 2, ["--sp"]), ("tensor_parallel.py", 2, ["--tp", "2", "--sp"]),
    ("tensor_parallel.py", 4, ["--tp", "2", "--sp"]),
    ("three_d.py", 1, []), ("three_d.py", 2, ["--pp", "2"]), ("three_d.py", 4, ["--pp", "2", "--tp", "2"]),
    ("three_d.py", 8, ["--pp", "2", "--tp", "2", "--sp"]),
    ("three_d.py", 4, ["--pp", "4", "--micro-batches", "2"]), ("three_d.py", 4, ["--tp", "2", "--sp"]),
    ("train_gpt.py", 3, []), ("zero.py", 1, []), ("zero.py", 2, []), ("zero.py", 4, [])])
def test_losses_on_other_meshes(tmp_path, script, world, more):
    test_losses_are_the_command_lines(tmp_path, script, world, more)


@pytest.mark.prove
@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_losses_do_not_depend_on_the_stage_of_zero(stage):
    want = losses("zero.py", 1, [*SAME, "--stage", "3"])
    assert losses("zero.py", 3, [*SAME, "--stage", stage]) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/*.py")), ids=lambda path: path.name)
def test_a_script_is_short(path):
    assert len(path.read_text().splitlines()) <= 150


def losses(script, world, argv):
    alone = [sys.executable, ROOT / "scripts" / script]
    many = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
            ROOT / "scripts" / script]
    done = subprocess.run([*(alone if world == 1 else many), *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(text) for text in re.findall(r"loss (\d+\.\d+)", done.stdout)]
