"""Through the command line's main: a run on N ranks is the run on one, in float64, to rounding."""
import functools
from itertools import product

import pytest

from nanoinfra.cli import main
from nanoinfra.train import metrics

FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--steps", "5", "--seq", "24",
         "--global-batch", "7", "--warmup", "2", "--clip", "0.4"]
CASES = [  # dp, micro-batch, optimizer, untied: every pair of values stands in some row; 7 divides by none
    (2, 1, "adamw", False), (2, 3, "sgd", True), (3, 1, "sgd", False), (3, 3, "adamw", True),
    (4, 1, "adamw", True), (4, 3, "sgd", False), (2, 1, "sgd", True), (4, 3, "adamw", False)]
EVERY = [
    *product((2, 3, 4), (1, 3), ("adamw", "sgd"), (False, True)),
    (8, 1, "adamw", False), (8, 1, "sgd", True)]


@pytest.mark.parametrize("dp, micro, optimizer, untied", CASES)
def test_losses_and_norms_are_those_of_one_rank(ranks, tmp_path, dp, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied)


@pytest.mark.prove
@pytest.mark.parametrize("dp, micro, optimizer, untied", EVERY)
def test_every_combination(ranks, tmp_path, dp, micro, optimizer, untied):
    compare(ranks, tmp_path, dp, micro, optimizer, untied)


def compare(ranks, tmp_path, dp, micro, optimizer, untied):
    want = alone(optimizer, untied, tmp_path)
    argv = [*FLAGS, "--dp", str(dp), "--micro-batch", str(micro), "--optimizer", optimizer,
            "--out", str(tmp_path)]
    assert ranks(dp).run(main, argv + ["--untied"] * untied) == [0] * dp
    got = metrics.read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in got] == [1, 2, 3, 4, 5]
    for w, g in zip(want, got):
        assert g["loss"] == pytest.approx(w["loss"], rel=1e-8)
        assert g["grad_norm"] == pytest.approx(w["grad_norm"], rel=1e-8)
        assert (g["tokens"], g["lr"]) == (w["tokens"], w["lr"])
    assert any(line["grad_norm"] > 0.4 for line in want)                   # so that clipping was at work
    psi = 54592 + 257 * 32 * untied
    assert {line["comm"]["data"] for line in got} == {8 * psi}             # each gradient once a step


def alone(optimizer, untied, tmp_path):
    return _alone(optimizer, untied, tmp_path.parent)


@functools.cache
def _alone(optimizer, untied, folder):
    out = folder / f"alone-{optimizer}-{untied}"
    argv = [*FLAGS, "--micro-batch", "7", "--optimizer", optimizer, "--threads", "1", "--out", str(out)]
    assert main(argv + ["--untied"] * untied) == 0
    return metrics.read(out / "metrics.jsonl")
