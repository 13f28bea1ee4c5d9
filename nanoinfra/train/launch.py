"""Start N ranks of `nanoinfra train` on this host, with torch's elastic launcher, and report how they ended.

A rank is this same command line in a process of its own (train/rank.py). SIGTERM reaches every rank; they
agree on a step, save, and stop, and then the launcher ends with 0. A user's mistake that only a rank could
see comes back through its error file as one line. Where restarts are allowed, a failed rank ends all, and all
are started again, from the last checkpoint.
"""
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.train.rank import BOARD, OURS, STOPPED, make_folder

NOTES = ".ranks"                             # in a run's directory, while it runs


def launch(argv: list[str], nproc: int, out: Path | None = None, max_restarts: int = 0) -> int:
    """Run `nanoinfra ARGV` on `nproc` ranks. Exit code 0, 2 for a user's mistake, 1 for a failed rank.

    `out` is a run's directory, where there is one.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    if out:
        make_folder(out)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    started = time.time()
    name = OURS + uuid.uuid4().hex[:8]
    with _notes(out) as notes:
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=name,
                              rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=max_restarts,
                              monitor_interval=0.1, shutdown_timeout=300,
                              logs_specs=DefaultLogsSpecs(log_dir=str(notes)))
        try:
            elastic_launch(config, sys.executable)("-m", "nanoinfra.cli", *argv)
            return 0
        except SignalException as stop:
            return _after_signal(stop, out, started)
        except ChildFailedError as failed:
            return _after_failure(failed, nproc, out)


@contextmanager
def _notes(out):
    """A folder for torch's notes on its ranks, which it would leave behind; a dead run's may be there."""
    folder = out / NOTES if out else Path(tempfile.mkdtemp(prefix=OURS))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _after_signal(stop, out, started):
    note = out and out / STOPPED
    if note and note.exists() and note.stat().st_mtime >= started:
        return 0
    late = " before the ranks could save" if out else ""
    print(f"nanoinfra: stopped by signal {int(stop.sigval)}{late}", file=sys.stderr)
    return 128 + int(stop.sigval)


def _after_failure(failed, world, out):
    """A killed rank is the cause, whatever its neighbours died of; then a mistake that a rank found."""
    killed = [r for r, f in failed.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    mistaken = [r for r, f in failed.failures.items() if f.exitcode == 2 and Path(f.error_file).exists()]
    rank = (killed + mistaken + [failed.get_first_failure()[0]])[0]
    failure = failed.failures[rank]
    if rank in mistaken:
        print(f"nanoinfra: {failure.message}", file=sys.stderr)
        return 2
    code = failure.exitcode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    remedy = "; --resume goes on from the last checkpoint" if out else ""
    print(f"nanoinfra: rank {rank} {how}{remedy}", file=sys.stderr)
    if out and (out / BOARD).exists():
        from nanoinfra.dist.ledger import Board, hang_report
        positions = Board(out / BOARD, world).positions()
        print(hang_report(positions, lambda r: "was killed" if r in killed else ""), file=sys.stderr)
        (out / BOARD).unlink()
    return 1
