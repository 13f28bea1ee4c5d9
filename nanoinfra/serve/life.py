"""One life of the engine's processes: start the ranks, hear them, notice when one is no more, end them all.

Each rank has a pipe to this process, whose other end nobody else holds: it closes when the rank dies, however
that comes about.
"""
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from nanoinfra.serve.loop import Failed, Ready

START = "from nanoinfra.serve.loop import main; main()"      # not -m: its classes would be __main__'s


def environment(world: int) -> dict[str, str]:
    """What each of `world` ranks is started with, unless the user's environment says otherwise.

    Its share of the cores; and, from glibc, memory in large pages, kept when freed: without, reading the
    weights takes 6 % longer, and each large tensor of a prompt comes as new pages from the system.
    """
    keep = 1 << 40
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world)),
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={1 << 30}:"
                              f"glibc.malloc.trim_threshold={keep}"}


class Dead(Exception):
    """A rank is no more; the text says which, and how it ended."""


class Life:
    """`world` ranks, each with the engine that `factory(team)` makes; a function that can be pickled."""

    def __init__(self, factory, world: int):
        self.lock, self.ready, self.broken, self.processes, self.pipes = threading.Lock(), False, "", [], []
        wires = [_pair() for _ in range(1, world)]                       # from rank 0 to each other one
        try:
            for rank in range(world):
                ends = [mine for mine, _ in wires] if rank == 0 else [wires[rank - 1][1]]
                self._start(rank, world, factory, ends)
        except OSError as error:
            self.broken = f"the engine could not be started: {error}"
        for end in [end for wire in wires for end in wire]:
            end.close()                      # the ranks have them now

    def send(self, command: tuple) -> None:
        """Let the ranks obey, if they still can; who hears them notices when they cannot."""
        with self.lock, suppress(OSError):
            self.pipes[0].send(command)

    def hear(self, timeout: float) -> list:
        """What the ranks have said, at most one thing each; [] after `timeout` seconds. Raises Dead."""
        if self.broken:
            raise Dead(self.broken)
        news = []
        for pipe in wait(self.pipes, timeout):
            try:
                news.append(pipe.recv())
            except (EOFError, OSError, pickle.UnpicklingError):          # the last one: killed while it spoke
                raise Dead(self._fate(self.pipes.index(pipe))) from None
        for each in news:
            if isinstance(each, Failed):
                raise Dead(each.why)
            self.ready |= isinstance(each, Ready)
        return news

    def kill(self) -> None:
        """End the ranks now, from any thread."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()

    def end(self) -> None:
        """Leave nothing of them."""
        self.kill()
        for process in self.processes:
            process.wait()
        with self.lock:
            for pipe in self.pipes:
                pipe.close()

    def _start(self, rank, world, factory, ends):
        mine, theirs = _pair()
        given = [end.fileno() for end in (theirs, *ends)]
        self.processes.append(subprocess.Popen(
            [sys.executable, "-c", START, *map(str, given)], pass_fds=given, stdin=subprocess.DEVNULL,
            env={**environment(world), **os.environ}))
        theirs.close()                       # so that the pipe ends when the rank does
        self.pipes.append(mine)
        mine.send((rank, factory))

    def _fate(self, rank):
        with suppress(subprocess.TimeoutExpired):
            self.processes[rank].wait(1.0)
        code = self.processes[rank].returncode
        how = ("closed its pipe" if code is None else f"ended with {code}" if code >= 0
               else f"was killed by {signal.Signals(-code).name}")
        return f"rank {rank} of the engine {how}"


def _pair():
    """Two ends of a pipe between processes."""
    return [Connection(end.detach()) for end in socket.socketpair()]
