"""Runs as processes: start one, watch it, find its ranks, compare what it wrote."""
import functools
import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.distributed.pool.rank_pool import shared_rank_pool
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.checkpoint import save_and_load
from tests import processes
from tests.processes import started
from tests.processes import until as wait_for  # noqa: F401  for those who import it from here

STEPS = 12
FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--seq", "24",
         "--threads", "1", "--global-batch", "7", "--micro-batch", "2", "--save-every", "2",
         "--steps", str(STEPS)]


def undisturbed(tmp_path, *more):
    """The lines of a run on two ranks that nothing disturbs; its directory is tmp_path / "undisturbed"."""
    (tmp_path / "undisturbed").symlink_to(_undisturbed(tmp_path.parent, *more))
    return metrics_and_plots.read_metrics(tmp_path / "undisturbed" / "metrics.jsonl")


@functools.cache
def _undisturbed(folder, *more):
    out = folder / " ".join(("undisturbed", *more))
    two = shared_rank_pool(2)
    two.timeout = 3600
    two.run(main, [*FLAGS, "--dp", "2", "--lr-schedule", "constant", *more, "--out", str(out)])
    return out


CLI = [sys.executable, "-m", "nanoinfra.cli"]
SAID = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


def running(argv, **more) -> AbstractContextManager[subprocess.Popen]:
    """`nanoinfra ARGV`, which ends with the `with`; `more` is for Popen, which gives its stderr."""
    return started([*CLI, *argv], **(SAID | more))


def start(argv, **more) -> subprocess.Popen:
    """`nanoinfra ARGV`, which whoever starts it has to end."""
    return subprocess.Popen([*CLI, *argv], **(SAID | more))


def finish(argv):
    with running(argv) as process:
        print(process.communicate()[1])
    return process.returncode


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(metrics_and_plots.read_metrics(path)) if path.exists() else 0


def children(pid: int) -> list[int]:
    """The ranks that a launcher has started."""
    return [child for child in processes.children(pid) if rank_of(child) is not None]


def rank_of(pid: int) -> int | None:
    """RANK of a process, from its environment; None where it has none or is gone."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
    return found[0] if found else None


def bits(lines):
    return [(line["step"], line["loss"].hex(), line["grad_norm"].hex(), line["tokens"]) for line in lines]


def close(got, want):
    assert [line["step"] for line in got] == [line["step"] for line in want]
    for g, w in zip(got, want):
        assert g["loss"] == pytest.approx(w["loss"], rel=1e-8)
        assert g["grad_norm"] == pytest.approx(w["grad_norm"], rel=1e-8)


def weights(run: Path) -> dict:
    newest = save_and_load.find_newest_checkpoint(run / "checkpoints")
    manifest = json.loads((newest / "manifest.json").read_text())
    return {name: listed["sha256"] for name, listed in manifest["files"].items()
            if name.endswith(".safetensors")}
