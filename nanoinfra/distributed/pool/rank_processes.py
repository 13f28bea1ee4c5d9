"""The rank processes of a pool: start them, send them a call, collect results, report failures and hangs.

They fork from multiprocessing's forkserver, which holds no thread and no socket of torch. Nothing outlives
the processes: the store belongs to this process, on loopback, the status board's file is unlinked once every
rank has opened it, and a rank whose pipe closes ends itself. Only data from these pipes is unpickled.
"""
import atexit
import multiprocessing
import signal
import sys
import tempfile
import time
import types
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

import cloudpickle

from nanoinfra.distributed.loopback_tcp_store import start_loopback_store
from nanoinfra.distributed.pool.rank_main import rank_main
from nanoinfra.distributed.rank_status_board import StatusBoard, hang_report

# Every torch optimizer imports torch._dynamo, which takes seconds: once in the forkserver, not in each rank.
# No module of this package: the forkserver does not know the caller's sys.path and might import another copy.
_PRELOADED_MODULES = ["torch", "torch._dynamo", "torch.distributed", "cloudpickle", "unittest.mock"]
_STARTUP_TIMEOUT_SECONDS = 120.0             # for the forkserver's imports, from a cold disk
_GRACE_SECONDS = 0.3                         # for the other ranks to answer once one has failed


class RankFailedError(RuntimeError):
    """A rank raised an exception, died or hung. The message says which, why, and where every rank stood."""


class RankProcesses:
    """Rank processes with their pipes, and the status board that they report to."""

    def __init__(self, num_ranks: int):
        self.processes, self.pipes = [], []
        self.store = start_loopback_store()
        atexit.register(self.kill_all)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "board")
                self.rank_status_board = StatusBoard(path, num_ranks)
                for rank in range(num_ranks):
                    self._start(rank, num_ranks, path)
                self._collect(_STARTUP_TIMEOUT_SECONDS)
        except BaseException:
            self.kill_all()
            raise

    def all_alive(self) -> bool:
        """Whether every rank process still runs."""
        for rank, pipe in enumerate(self.pipes):
            while pipe.poll():
                if self._receive(rank)[0] == "died":
                    return False
        return True

    def run_pickled_call(self, pickled_call: bytes, timeout: float) -> list:
        """Run a pickled RankCall on every rank and return the results, one a rank, within `timeout` seconds.

        After a RankFailedError the processes cannot be used again.
        """
        self.rank_status_board.clear_statuses()
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # the rank died just now; _collect reports it
                pipe.send_bytes(pickled_call)
        return self._collect(timeout)

    def kill_all(self) -> None:
        """Kill the processes that still run, and close the pipes and the store."""
        if not self.processes:               # done: Python's end closes an open pool once more
            return
        atexit.unregister(self.kill_all)
        for process in self.processes:
            process.kill()                   # ends a stopped process too
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes, self.store = [], [], None

    def _start(self, rank, n, board):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED_MODULES)
        mine, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, rank, n, self.store.port, str(board)))
        with _main_hidden():
            process.start()
        theirs.close()                       # so that the pipe ends when the rank does
        self.processes.append(process)
        self.pipes.append(mine)

    def _collect(self, timeout):
        results, failures, end = {}, {}, time.monotonic() + timeout
        waiting = dict(zip(self.pipes, range(len(self.pipes))))
        while waiting and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                kind, value = self._receive(rank := waiting[pipe])
                if kind in ("stdout", "stderr"):
                    continue
                del waiting[pipe]
                (results if kind == "result" else failures)[rank] = value
                if failures:
                    end = min(end, time.monotonic() + _GRACE_SECONDS)
        if waiting or failures:
            raise RankFailedError(self._explain(results, failures, timeout))
        return [results[rank] for rank in sorted(results)]

    def _receive(self, rank):
        try:
            kind, value = cloudpickle.loads(self.pipes[rank].recv_bytes())
        except (EOFError, ConnectionResetError):       # the other end is gone
            return "died", None
        if kind in ("stdout", "stderr"):
            print(f"[{rank}] {value}", file=getattr(sys, kind), flush=True)
        return kind, value

    def _explain(self, results, failures, timeout):
        n = len(self.processes)
        dead = [rank for rank, trace in failures.items() if trace is None]
        for rank in dead:
            self.processes[rank].join(10.0)  # its pipe has closed; on a busy machine it ends later
        fates = [_fate(p, rank in results, failures.get(rank)) for rank, p in enumerate(self.processes)]
        if dead:                             # reported first: it makes the others' collectives fail
            head = f"rank {dead[0]} of {n} {fates[dead[0]]}"
        elif failures:
            rank, trace = next(iter(failures.items()))
            head = f"rank {rank} of {n} failed\n{trace.rstrip()}"
        else:
            head = f"{n - len(results)} of {n} ranks gave no answer within {timeout:g} s"
        report = hang_report(self.rank_status_board.read_statuses(), fates.__getitem__)
        return f"{head}\nwhere each rank stood:\n{report}"


def _fate(process, returned, trace):
    if returned:
        return "has returned"
    if trace:
        return "has failed"
    process.join(0.1)
    if (code := process.exitcode) is not None:
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return "is stopped" if _stopped(process.pid) else ""


def _stopped(pid):
    stat = Path(f"/proc/{pid}/stat")         # systems without /proc report nothing
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "Tt"


@contextmanager
def _main_hidden():
    """Keep multiprocessing from running the caller's main file in each rank; functions go by value."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
