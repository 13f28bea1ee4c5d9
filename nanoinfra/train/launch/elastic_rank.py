"""One rank process under torchrun or our launcher: it joins the process group and reports where it stands.

It is found by torchrun's environment variables and dies with its launcher. When a collective does not end, it
prints which rank has not entered it, and kills that rank if it is on this host, as a stopped process obeys no
other signal. On an elastic restart of the same launch the ranks resume from the newest good checkpoint
(train/run_directory/run_directory.py asks `launch_id` and `ranks_were_restarted`).
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

LAUNCH_ID_PREFIX = "nanoinfra-"              # begins the run id of every launch by launch_ranks.py
STATUS_BOARD_FILE = "where_ranks_stand"      # in the run directory: the status of each rank, while it runs
ELASTIC_LOGS_FOLDER = ".ranks"               # in the run directory: files of torch's agent, while it runs
STOP_NOTE_FILE = "stopped.json"              # in the run directory: rank 0's note that a signal ended the run


def is_launched_rank() -> bool:
    """Whether torchrun or `launch_ranks` started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_by_nanoinfra() -> bool:
    """Whether train/launch/launch_ranks.py started this rank; the launcher then prints for it."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(LAUNCH_ID_PREFIX)


def _local_rank() -> int:
    """This rank's number on its host: LOCAL_RANK, or RANK when ranks are started by hand on one host."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def process_group_is_initialized() -> bool:
    """Whether this process has joined a process group already, as the ranks of a pool have."""
    distributed = sys.modules.get("torch.distributed")       # not imported for this: it takes a second
    return distributed is not None and distributed.is_initialized()


def launch_id() -> str | None:
    """The run id that all ranks of a launch share, restarted or not; None when there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none") if is_launched_rank() else "none"
    return None if name == "none" else name  # torchrun's name for a launch without an id


def ranks_were_restarted() -> bool:
    """Whether this launch has started its ranks before (--max-restarts)."""
    return is_launched_rank() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@contextmanager
def rank_process_group(device: str, out: Path | None = None, timeout: float = 600.0):
    """Join torch.distributed for the time of the `with`, with a status board of all ranks in `out`.

    A collective may take `timeout` seconds. Does nothing in a process that is no rank, or in a pool's rank.
    """
    if process_group_is_initialized() or not is_launched_rank():
        if out and out.is_dir() and not process_group_is_initialized():
            _remove_files_of_killed_launcher(out)
        yield
        return
    die_with_parent()
    import torch.distributed as dist

    from nanoinfra.distributed.comm import CollectiveFailed
    from nanoinfra.distributed.rank_status_board import StatusBoard, report_status_to
    from nanoinfra.train.launch.rendezvous import rendezvous_ranks
    if device == "cuda":
        import torch
        torch.cuda.set_device(_local_rank())
    board, rank = None, int(os.environ["RANK"])
    if out:
        make_run_folder(out)
        board = StatusBoard(out / STATUS_BOARD_FILE, int(os.environ["WORLD_SIZE"]), rank)
        board.write_status({})                      # overwrite the status of an earlier attempt
        report_status_to(board)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"           # counts travel on the CPU
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **rendezvous_ranks())
    try:
        yield
    except CollectiveFailed as lost:
        print(f"nanoinfra: rank {rank}: {lost}{_describe_hang(board, rank, lost)}",
              file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)                          # destroying the group would wait for the lost rank
    finally:
        report_status_to(None)
        dist.destroy_process_group()
    if out:
        (out / STATUS_BOARD_FILE).unlink(missing_ok=True)  # kept after a failure, for the launcher to read


def _remove_files_of_killed_launcher(out):
    """Remove the files that a launcher which was killed has left in the run directory."""
    shutil.rmtree(out / ELASTIC_LOGS_FOLDER, ignore_errors=True)
    (out / STATUS_BOARD_FILE).unlink(missing_ok=True)


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent dies; on other systems this does nothing.

    `parent` is the parent's process id; when it is given, a parent that has died already is noticed.
    """
    if sys.platform == "linux":
        parent = parent or os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)           # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)                      # the parent died before prctl


def send_error_to_launcher(message: str) -> bool:
    """In a rank of our launcher, give it a user's mistake to print once, and return True; else False."""
    ours = is_launched_rank() and launched_by_nanoinfra()
    if ours:
        note = json.dumps({"message": message, "timestamp": time.time()})
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(note)
    return ours


def make_run_folder(path: Path) -> None:
    """Make a run directory, or a folder in it. Raises ValueError when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --out {path}: {error.strerror}; "
                         "name a folder that you may write to") from error


def _describe_hang(board, rank, lost):
    """Which ranks did not enter the collective, in words; those that hang on this host are killed."""
    from nanoinfra.distributed.rank_status_board import hang_report
    if board is None:
        return ""
    statuses = board.read_statuses()
    killed = _kill_hung_ranks_on_this_host(board, statuses, rank, lost)
    return "; ".join(["", hang_report(statuses).splitlines()[rank], *killed])


def _kill_hung_ranks_on_this_host(board, statuses, rank, lost):
    """Kill the ranks that hang or are stopped on this host; returns a line on each."""
    hung, lines = find_hung_ranks(rank, statuses) if "imed out" in str(lost) else [], []
    for other, status in enumerate(statuses):
        if other != rank and status.get("host") == board.process_identity["host"]:
            state = "stopped" if _is_stopped(status["pid"]) else "hung" if other in hung else ""
            if state and kill_process(status["pid"]):
                lines.append(f"rank {other} (process {status['pid']}) was {state}: ended it")
    return lines


def find_hung_ranks(waiting_rank: int, statuses: list[dict]) -> list[int]:
    """The ranks that `waiting_rank` waits for, directly or through others, and that wait for nobody."""
    from nanoinfra.distributed.rank_status_board import missing_ranks
    found, new = set(), {waiting_rank}
    while new:
        found |= new
        new = {late for r in new for late in missing_ranks(r, statuses)} - found
    return sorted(r for r in found if statuses[r].get("state") != "waits")


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped this process; known on Linux only."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state == "T"


def kill_process(pid: int) -> bool:
    """Send SIGKILL to process `pid`; returns whether there was one."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
