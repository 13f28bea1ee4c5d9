"""A rank's life: found by torchrun's variables, it joins the others and says where it stands.

It dies with its launcher. Where a collective does not end, it says which rank has not come, and ends that one
if it is on this host: a stopped process obeys no other signal. Started again by the same launch, it goes on
from the newest good checkpoint (train/run_directory/run_directory.py asks `launch_id` and `restarted`).
"""
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

OURS = "nanoinfra-"                          # how launches of train/launch/launcher.py are called
BOARD = "where_ranks_stand"                  # ledger.Board of a run under way
NOTES = ".ranks"                             # of our launcher in the run's directory, while the run lives
STOPPED = "stopped.json"                     # rank 0's note in the run directory: a signal ended the run


def is_rank() -> bool:
    """Was this process started by torchrun or by `launch`?"""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_us() -> bool:
    """Is this a rank of train/launch/launcher.py, which speaks for it?"""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(OURS)


def local_rank() -> int:
    """This rank's place on its host, by LOCAL_RANK; who starts ranks by hand may leave it out on one host."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def joined() -> bool:
    """Is this process a rank already, of a pool say?"""
    distributed = sys.modules.get("torch.distributed")       # not imported for this: it takes a second
    return distributed is not None and distributed.is_initialized()


def launch_id() -> str | None:
    """What all ranks of one launch share, started again or not; None where there is nothing of the kind."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none") if is_rank() else "none"    # or left in a shell
    return None if name == "none" else name                  # torchrun's name for a launch without one


def restarted() -> bool:
    """Has this launch started its ranks before?"""
    return is_rank() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def process_group(device: str, out: Path | None = None, timeout: float = 600.0):
    """This rank's life in torch.distributed, with a board in `out` that says where each rank stands.

    A collective may take `timeout` seconds. A plain process, or a rank of a pool, stays what it is.
    """
    if joined() or not is_rank():
        if out and out.is_dir() and not joined():
            _tidy(out)
        yield
        return
    end_with_parent()
    import torch.distributed as dist

    from nanoinfra.distributed.comm import LostRank
    from nanoinfra.distributed.ledger import Board, report_to
    from nanoinfra.train.launch.rendezvous import meet
    if device == "cuda":
        import torch
        torch.cuda.set_device(local_rank())
    board, rank = None, int(os.environ["RANK"])
    if out:
        make_folder(out)
        board = Board(out / BOARD, int(os.environ["WORLD_SIZE"]), rank)
        board.write({})                      # over what an earlier attempt has left there
        report_to(board)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"           # counts travel on the CPU
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **meet())
    try:
        yield
    except LostRank as lost:
        print(f"nanoinfra: rank {rank}: {lost}{_who(board, rank, lost)}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)                          # what torch still holds waits for the lost one too
    finally:
        report_to(None)
        dist.destroy_process_group()
    if out:
        (out / BOARD).unlink(missing_ok=True)                # kept after a failure, for the launcher to read


def _tidy(out):
    """Remove what the launcher of an earlier run could not, because it was killed."""
    shutil.rmtree(out / NOTES, ignore_errors=True)
    (out / BOARD).unlink(missing_ok=True)


def end_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its launcher dies; elsewhere nobody does.

    `parent` is the launcher's process id: who knows it notices that the launcher has died already.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)                      # it died before


def leave_error(message: str) -> bool:
    """In a rank of `launch`, hand a user's mistake to the launcher, to print once. False under torchrun."""
    ours = is_rank() and launched_by_us()
    if ours:
        note = json.dumps({"message": message, "timestamp": time.time()})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(note)
    return ours


def make_folder(path: Path) -> None:
    """A run directory, or a folder in it. Raises ValueError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --out {path}: {error.strerror}; "
                         "name a folder that you may write to") from error


def _who(board, rank, lost):
    """Who did not come, in words. The hung ones that are on this host are ended."""
    from nanoinfra.distributed.ledger import hang_report
    if board is None:
        return ""
    positions = board.positions()
    said = f"; {hang_report(positions).splitlines()[rank]}"
    hung = culprits(rank, positions) if "imed out" in str(lost) else []
    for other, at in enumerate(positions):
        if other != rank and at.get("host") == board.me["host"]:
            state = "stopped" if is_stopped(at["pid"]) else "hung" if other in hung else ""
            if state and end(at["pid"]):
                said += f"; rank {other} (process {at['pid']}) was {state}: ended it"
    return said


def culprits(rank: int, positions: list[dict]) -> list[int]:
    """Whom `rank` waits for, directly or through others that wait, and who wait for nobody themselves."""
    from nanoinfra.distributed.ledger import absent
    found, new = set(), {rank}
    while new:
        found |= new
        new = {late for r in new for late in absent(r, positions)} - found
    return sorted(r for r in found if positions[r].get("state") != "waits")


def is_stopped(pid: int) -> bool:
    """Has a signal stopped this process? Seen on Linux alone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state == "T"


def end(pid: int) -> bool:
    """SIGKILL for process `pid`; was there one?"""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
