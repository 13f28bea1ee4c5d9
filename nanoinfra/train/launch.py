"""Start N ranks of `nanoinfra train` on this host, with torch's elastic launcher, and report how they ended.

A rank is this same command line in a process of its own, found by torchrun's variables. SIGTERM reaches
every rank; they agree on a step, save, and stop, and then the launcher ends with 0. A user's mistake that
only a rank could see comes back through its error file as one line.
"""
import json
import logging
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

RUN_ID = "nanoinfra"                         # torch hands it to every rank: so a rank knows whose it is
BOARD = "where_ranks_stand"                  # ledger.Board of a run under way
STOPPED = "stopped.json"                     # rank 0's note in the run directory: a signal ended the run


def is_rank() -> bool:
    """Was this process started by torchrun or by `launch`?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def joined() -> bool:
    """Is this process a rank already, of a pool say?"""
    distributed = sys.modules.get("torch.distributed")       # not imported for this: it takes a second
    return distributed is not None and distributed.is_initialized()


@contextmanager
def process_group(device: str, out: Path | None = None):
    """This rank's life in torch.distributed, with a board in `out` that says where each rank stands.

    A plain process, or a rank of a pool, stays what it is.
    """
    if joined() or not is_rank():
        yield
        return
    import torch.distributed as dist

    from nanoinfra.dist.ledger import Board, report_to
    if device == "cuda":
        import torch
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")   # counts travel on the CPU
    if out:
        make_folder(out)
        report_to(Board(out / BOARD, dist.get_world_size(), dist.get_rank()))
    try:
        yield
    finally:
        report_to(None)
        dist.destroy_process_group()
    if out:
        (out / BOARD).unlink(missing_ok=True)                # kept after a failure, for the launcher to read


def launch(argv: list[str], nproc: int, out: Path | None = None) -> int:
    """Run `nanoinfra ARGV` on `nproc` ranks. Exit code 0, 2 for a user's mistake, 1 for a failed rank.

    `out` is a run's directory, where there is one.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    if out:
        make_folder(out)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=RUN_ID, rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
                          shutdown_timeout=300)
    started = time.time()
    try:
        elastic_launch(config, sys.executable)("-m", "nanoinfra.cli", *argv)
        return 0
    except SignalException as stop:
        return _after_signal(stop, out, started)
    except ChildFailedError as failed:
        return _after_failure(failed, nproc, out)


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


def make_folder(path: Path) -> None:
    """A run directory, or a folder in it. Raises ValueError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --out {path}: {error.strerror}; "
                         "name a folder that you may write to") from error


def leave_error(message: str) -> bool:
    """In a rank of `launch`, hand a user's mistake to the launcher, to print once. False under torchrun."""
    ours = os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID
    if ours:
        note = json.dumps({"message": message, "timestamp": time.time()})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(note)
    return ours
