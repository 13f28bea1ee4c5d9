"""A run directory that an earlier version wrote (tests/fixtures/) is resumed and generated from."""
import json
import shutil
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.train import metrics_and_plots

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_renaming"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
ARGV = ["train", "--model", "test", "--data", "text", "--vocab", "330", "--seq", "64", "--micro-batch", "2",
        "--global-batch", "8", "--dp", "2", "--pp", "2", "--schedule", "interleaved", "--virtual-stages", "2",
        "--grad-sync", "buckets", "--emulate-link", "dp=1e-6,1e10", "--optimizer", "adamw", "--lr", "0.02",
        "--warmup", "2", "--save-every", "40", "--keep-checkpoints", "1", "--eval-every", "40", "--threads",
        "1",
        "--out", "run", "--steps", "83", "--resume"]


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    """A copy of the old run directory and its corpus; the current folder is theirs."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_an_old_run_is_resumed_to_the_same_metrics(old_run, ranks):
    """On the mesh that wrote it. In float32: another CPU may round otherwise."""
    assert ranks(4).run(main, ARGV) == [0] * 4
    got = metrics_and_plots.read_metrics(old_run / "metrics.jsonl")
    assert [line["step"] for line in got] == list(range(1, 84))
    for line, want in zip(got[80:], EXPECTED["steps"], strict=True):
        scalars = want["comm"]["scalars"] + 8          # the normalizer of the loss, 8 bytes, is sent too
        assert line["comm"] == want["comm"] | {"scalars": scalars} and line["tokens"] == want["tokens"]
        assert line["lr"] == pytest.approx(want["lr"], rel=1e-12)
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
    assert got[-1]["held_out_bpb"] == pytest.approx(EXPECTED["steps"][-1]["held_out_bpb"], rel=1e-4)


@pytest.mark.parametrize("prompt", EXPECTED["generated"])
def test_an_old_run_is_generated_from_with_the_same_tokens(old_run, capsys, prompt):
    assert main(["generate", str(old_run), prompt, "--max-new-tokens", "24", "--dtype", "float64"]) == 0
    assert capsys.readouterr().out == EXPECTED["generated"][prompt] + "\n"
