"""The engine's rank processes: start them, send commands, receive messages, notice when one dies, kill all.

Each rank has a pipe to this process, whose other end nobody else holds: it closes when the rank dies, for
whatever reason. Commands are sent by a thread, which alone waits for an engine that is stopped.
"""
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

from nanoinfra.distributed.cpu_threads import default_threads_per_rank
from nanoinfra.serve.processes.engine_loop import API_SIGNALS, EngineLoadFailed, EngineReady, EngineStepResult
from nanoinfra.serve.processes.tensor_parallel_group import TensorParallelGroup

_RANK_PROGRAM = "from nanoinfra.serve.processes.engine_loop import main; main()"   # -m: in __main__


def rank_environment(num_ranks: int) -> dict[str, str]:
    """The environment variables of each of `num_ranks` rank processes, unless the user has set them.

    They give a rank its share of the cores, and let glibc take memory in large pages and keep it when it is
    freed: without that, reading the weights takes 6 % longer, and each large tensor of a prompt comes as new
    pages from the system.
    """
    keep = 1 << 40
    return {"OMP_NUM_THREADS": str(default_threads_per_rank(num_ranks)),
            "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={1 << 30}:"
                              f"glibc.malloc.trim_threshold={keep}"}


class ProcessDied(Exception):
    """A rank process has ended; the text says which one, and how."""


class EngineProcesses:
    """`num_ranks` processes, each with the engine that `engine_factory(tp_group)` makes (it is pickled).

    `loaded`: the engine is ready. `has_stepped`: it has also done a step. After an end, start a new object.
    """

    def __init__(self, engine_factory: Callable[[TensorParallelGroup], object], num_ranks: int):
        self.loaded, self.has_stepped = False, False
        self.reason, self.commands = "", queue.SimpleQueue()
        self.processes, self.pipes = [], []
        wires = [_pair() for _ in range(1, num_ranks)]                   # from rank 0 to each other one
        try:
            for rank in range(num_ranks):
                ends = [mine for mine, _ in wires] if rank == 0 else [wires[rank - 1][1]]
                self._start(rank, num_ranks, engine_factory, ends)
        except Exception as error:           # also of a factory that cannot be pickled
            self.kill_all(f"the engine could not be started: {error}")
        for end in [end for wire in wires for end in wire]:
            end.close()                      # the ranks have them now
        self.sender = threading.Thread(target=self._send_commands, name="sender of commands", daemon=True)
        self.sender.start()

    def send_command(self, command: tuple) -> None:
        """Queue a command for rank 0. Never waits; `receive_messages` notices when the ranks are gone."""
        self.commands.put(command)

    def receive_messages(self) -> list[EngineReady | EngineStepResult]:
        """Wait for messages of the ranks; at most one of each. Raises ProcessDied."""
        if not self.pipes:
            raise ProcessDied(self.reason)   # not one could be started
        messages = []
        for pipe in wait(self.pipes):
            try:
                messages.append(pipe.recv())
            except (EOFError, OSError, pickle.UnpicklingError):          # the last one: killed while it sent
                raise ProcessDied(self.reason or self._how_it_ended(self.pipes.index(pipe))) from None
        for message in messages:
            if isinstance(message, EngineLoadFailed):
                raise ProcessDied(message.reason)
            self.loaded |= isinstance(message, EngineReady)
            self.has_stepped |= isinstance(message, EngineStepResult)
        return messages

    def kill_all(self, reason: str = "") -> None:
        """Kill the ranks, and what they have started,
        say a compiler; `receive_messages` raises `reason` then.

        From any thread, and without waiting.
        """
        self.reason = self.reason or reason
        for sign in (signal.SIGSTOP, signal.SIGKILL):        # none should see another's end, and complain
            for process in self.processes:
                with suppress(ProcessLookupError, PermissionError):      # macOS's word for one just dead
                    if process.poll() is None:
                        os.killpg(process.pid, sign)

    def kill_and_wait(self) -> None:
        """Kill the ranks, wait for their end, and close their pipes."""
        self.kill_all()
        for process in self.processes:
            process.wait()
        self.commands.put(None)
        self.sender.join()
        for pipe in self.pipes:
            pipe.close()

    def _send_commands(self):
        """The sender thread, until the ranks are gone."""
        with suppress(OSError):
            while command := self.commands.get():
                self.pipes[0].send(command)

    def _start(self, rank, num_ranks, engine_factory, ends):
        mine, theirs = _pair()
        given = [end.fileno() for end in (theirs, *ends)]
        command = [sys.executable, "-c", _RANK_PROGRAM, *map(str, (os.getpid(), *given))]
        with block_signals(API_SIGNALS):
            self.processes.append(subprocess.Popen(
                command, pass_fds=given, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**rank_environment(num_ranks),
                     **os.environ}))      # a session, so a group: for `kill_all`
        theirs.close()                       # so that the pipe ends when the rank does
        self.pipes.append(mine)
        mine.send((rank, engine_factory))

    def _how_it_ended(self, rank):
        with suppress(subprocess.TimeoutExpired):
            self.processes[rank].wait(1.0)
        code = self.processes[rank].returncode
        how = ("closed its pipe" if code is None else f"ended with {code}" if code >= 0
               else f"was killed by {signal.Signals(-code).name}")
        return f"rank {rank} of the engine {how}"


@contextmanager
def block_signals(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Let processes that this thread starts meanwhile begin with `signals` blocked.

    Else a signal could end a young process before it has set its handlers: systemd, say, sends SIGTERM to all
    processes of a service at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _pair():
    """Two ends of a pipe between processes."""
    return [Connection(end.detach()) for end in socket.socketpair()]
