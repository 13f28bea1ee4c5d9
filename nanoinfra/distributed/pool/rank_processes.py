"""The processes of one life of a pool of ranks: start, ask, listen, and say who failed and where all stood.

They fork from multiprocessing's forkserver, which holds no thread and no socket of torch. Nothing outlives
the crew: the store is this process's own, on loopback, the board's file is unlinked once every rank has it
open, and a rank whose pipe closes ends itself. What is unpickled comes from pipes that no other process has.
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

from nanoinfra.distributed.ledger import Board, hang_report
from nanoinfra.distributed.loopback import master_store
from nanoinfra.distributed.pool.rank_main import serve

# Every torch optimizer imports torch._dynamo, which takes seconds: once in the server, not once in each rank.
# Nothing of this package: the server does not know the caller's sys.path and might hold another copy of it.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.device_mesh", "cloudpickle", "unittest.mock"]
START_SECONDS = 120.0                        # for the server's imports, from a cold disk
GRACE = 0.3                                  # seconds the other ranks have to answer once one has failed


class RanksError(RuntimeError):
    """A rank failed, died or hung; the text says which, why, and where every rank stood."""


class Crew:
    """`n` rank processes with their pipes, and the board they report to."""

    def __init__(self, n: int):
        self.processes, self.pipes = [], []
        self.store = master_store()
        atexit.register(self.end)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "board")
                self.board = Board(path, n)
                for rank in range(n):
                    self._start(rank, n, path)
                self._collect(START_SECONDS)
        except BaseException:
            self.end()
            raise

    def alive(self) -> bool:
        """Is every rank still there to be asked?"""
        for rank, pipe in enumerate(self.pipes):
            while pipe.poll():
                if self._hear(rank)[0] == "died":
                    return False
        return True

    def run(self, text: bytes, timeout: float) -> list:
        """One answer a rank to a pickled Call. Raises RanksError; the crew is of no more use then."""
        self.board.clear()
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # a rank that died just now; _collect says so
                pipe.send_bytes(text)
        return self._collect(timeout)

    def end(self) -> None:
        """Kill all that still runs."""
        atexit.unregister(self.end)
        for process in self.processes:
            process.kill()                   # works on a stopped process too
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes, self.store = [], [], None

    def _start(self, rank, n, board):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, rank, n, self.store.port, str(board)))
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
                kind, value = self._hear(rank := waiting[pipe])
                if kind in ("stdout", "stderr"):
                    continue
                del waiting[pipe]
                (results if kind == "result" else failures)[rank] = value
                if failures:
                    end = min(end, time.monotonic() + GRACE)
        if waiting or failures:
            raise RanksError(self._explain(results, failures, timeout))
        return [results[rank] for rank in sorted(results)]

    def _hear(self, rank):
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
            self.processes[rank].join(10.0)  # its pipe has closed; on a busy machine the end comes later
        fates = [_fate(p, rank in results, failures.get(rank)) for rank, p in enumerate(self.processes)]
        if dead:                             # first, because it makes the collectives of the others fail
            head = f"rank {dead[0]} of {n} {fates[dead[0]]}"
        elif failures:
            rank, trace = next(iter(failures.items()))
            head = f"rank {rank} of {n} failed\n{trace.rstrip()}"
        else:
            head = f"{n - len(results)} of {n} ranks gave no answer within {timeout:g} s"
        return f"{head}\nwhere each rank stood:\n{hang_report(self.board.positions(), fates.__getitem__)}"


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
    stat = Path(f"/proc/{pid}/stat")         # where there is no /proc, nothing is said
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] in "Tt"


@contextmanager
def _main_hidden():
    """Functions travel by value: keep multiprocessing from running the caller's main file in each rank."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
