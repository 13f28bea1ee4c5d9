"""One life of the engine's processes: start the ranks, hear them, notice when one is no more, end them all.

Each rank has a pipe to this process, whose other end nobody else holds: it closes when the rank dies, however
that comes about. Commands leave through a thread: it alone waits for an engine that is stopped.
"""
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from nanoinfra.distributed.cpu_threads import default_threads
from nanoinfra.serve.processes.engine_loop import MEANT_FOR_API, Failed, Ready, Step

START = "from nanoinfra.serve.processes.engine_loop import main; main()"  # with -m its classes are __main__'s


def environment(world: int) -> dict[str, str]:
    """What each of `world` ranks is started with, unless the user's environment says otherwise.

    Its share of the cores; and, from glibc, memory in large pages, kept when freed: without, reading the
    weights takes 6 % longer, and each large tensor of a prompt comes as new pages from the system.
    """
    keep = 1 << 40
    return {"OMP_NUM_THREADS": str(default_threads(world)),
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={1 << 30}:"
                              f"glibc.malloc.trim_threshold={keep}"}


class Dead(Exception):
    """A rank is no more; the text says which, and how it ended."""


class Life:
    """`world` ranks, each with the engine that `factory(team)` makes; a function that can be pickled.

    `ready`: the engine was loaded. `served`: it has also done a step.
    """

    def __init__(self, factory, world: int):
        self.ready, self.served, self.why = False, False, ""
        self.processes, self.pipes, self.commands = [], [], queue.SimpleQueue()
        wires = [_pair() for _ in range(1, world)]                       # from rank 0 to each other one
        try:
            for rank in range(world):
                ends = [mine for mine, _ in wires] if rank == 0 else [wires[rank - 1][1]]
                self._start(rank, world, factory, ends)
        except Exception as error:           # also of a factory that cannot be pickled
            self.kill(f"the engine could not be started: {error}")
        for end in [end for wire in wires for end in wire]:
            end.close()                      # the ranks have them now
        self.sender = threading.Thread(target=self._send, name="sender of commands", daemon=True)
        self.sender.start()

    def send(self, command: tuple) -> None:
        """Let the ranks obey, if they still can. Never waits; who hears them notices when they cannot."""
        self.commands.put(command)

    def hear(self) -> list:
        """What the ranks have said, at most one thing each; waits for it. Raises Dead."""
        if not self.pipes:
            raise Dead(self.why)             # not one could be started
        news = []
        for pipe in wait(self.pipes):
            try:
                news.append(pipe.recv())
            except (EOFError, OSError, pickle.UnpicklingError):          # the last one: killed while it spoke
                raise Dead(self.why or self._fate(self.pipes.index(pipe))) from None
        for each in news:
            if isinstance(each, Failed):
                raise Dead(each.why)
            self.ready |= isinstance(each, Ready)
            self.served |= isinstance(each, Step)
        return news

    def kill(self, why: str = "") -> None:
        """End the ranks now, and what they have started, say a compiler; `why` is what `hear` then raises.

        From any thread, and without waiting.
        """
        self.why = self.why or why
        for sign in (signal.SIGSTOP, signal.SIGKILL):        # none should see another's end, and complain
            for process in self.processes:
                with suppress(ProcessLookupError, PermissionError):      # macOS's word for one just dead
                    if process.poll() is None:
                        os.killpg(process.pid, sign)

    def end(self) -> None:
        """Leave nothing of them."""
        self.kill()
        for process in self.processes:
            process.wait()
        self.commands.put(None)
        self.sender.join()
        for pipe in self.pipes:
            pipe.close()

    def _send(self):
        """The sender's work, until the ranks are no more."""
        with suppress(OSError):
            while command := self.commands.get():
                self.pipes[0].send(command)

    def _start(self, rank, world, factory, ends):
        mine, theirs = _pair()
        given = [end.fileno() for end in (theirs, *ends)]
        command = [sys.executable, "-c", START, *map(str, (os.getpid(), *given))]
        with blocked(MEANT_FOR_API):
            self.processes.append(subprocess.Popen(
                command, pass_fds=given, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**environment(world), **os.environ}))   # a session, so a group, of its own: for `kill`
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


@contextmanager
def blocked(signals):
    """Processes that this thread starts meanwhile have `signals` blocked: none ends them before they say how.

    systemd, say, sends SIGTERM to all processes of a service at once, however young they are.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pair():
    """Two ends of a pipe between processes."""
    return [Connection(end.detach()) for end in socket.socketpair()]
