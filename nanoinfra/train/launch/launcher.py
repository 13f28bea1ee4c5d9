"""Start N ranks of `nanoinfra train` on this host, with torch's elastic agent, and report how they ended.

A rank is this same command line in a process of its own (train/launch/elastic_rank.py). SIGTERM reaches every
rank; they agree on a step, save, and stop, and then the launcher ends with 0. A user's mistake that only a
rank could see comes back through its error file as one line. Where restarts are allowed, a failed rank ends
all, and all are started again, from the last checkpoint.
"""
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import HashStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.events import Event, EventSource
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from nanoinfra.distributed.cpu_threads import default_threads
from nanoinfra.distributed.loopback import HOST, master_store
from nanoinfra.train.checkpoint.checkpoint import checkpoints
from nanoinfra.train.launch.elastic_rank import BOARD, NOTES, OURS, STOPPED, end, make_folder
from nanoinfra.train.launch.signals import announce, is_another, not_ignored, say
from nanoinfra.train.launch.stop_message import how_to_go_on, say_where
from nanoinfra.train.run_directory.ownership import last_config

PATIENCE = 300                               # seconds that ranks have to save, when a signal stops the run


def launch(argv: list[str], nproc: int, out: Path | None = None, max_restarts: int = 0,
           module: str = "nanoinfra.cli") -> int:
    """Run `python -m MODULE ARGV` on `nproc` ranks. Exit code 0, 2 for a user's mistake, 1 for a failed rank.

    `out` is a run's directory, where there is one.
    """
    if out:
        make_folder(out)
    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(default_threads(nproc)))
    started, meeting = time.time(), LoopbackRendezvous(OURS + uuid.uuid4().hex[:8])
    spec = WorkerSpec("rank", nproc, meeting, entrypoint=sys.executable, max_restarts=max_restarts,
                      args=("-m", module, *argv), monitor_interval=0.1)
    with _notes(out) as notes:
        agent = Agent(spec, DefaultLogsSpecs(str(notes)), out)
        try:
            with agent.taking_signals():
                failures = agent.run().failures
        except SignalException as stop:
            return _after_signal(stop.sigval, out, argv, started)
        finally:
            meeting.shutdown()
        return _after_failure(failures, nproc, out) if failures else 0


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one agent: its ranks meet at a store on loopback, which the agent does not read.

    torch's own c10d rendezvous listens on every interface and unpickles what it finds in its store.
    """
    use_agent_store = True                   # the ranks take the store that is here, and start none

    def __init__(self, run_id: str):
        self.run_id, self.store = run_id, master_store()

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of 1 agents, which keeps its own notes in memory; the ranks learn the store's address."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(HOST, self.store.port))

    def get_run_id(self) -> str:
        return self.run_id

    def get_backend(self) -> str:
        return "loopback"

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return self.store is None

    def set_closed(self) -> None:
        self.store = None

    def shutdown(self) -> bool:
        self.set_closed()
        return True


class Agent(LocalElasticAgent):
    """torch's agent, which watches the ranks and starts them again, and here says why."""

    def __init__(self, spec: WorkerSpec, notes: DefaultLogsSpecs, out: Path | None):
        super().__init__(spec, notes, shutdown_timeout=PATIENCE)
        self.name, self.out, self.stopped = spec.rdzv_handler.get_run_id(), out, 0.0

    @contextmanager
    def taking_signals(self):
        """Here the first signal lets the ranks save and end, and a second one kills them."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""                # torch's own handlers stay out
        mine = threading.current_thread() is threading.main_thread()     # which alone hears signals
        before = {sign: signal.signal(sign, self._signalled) for sign in not_ignored() if mine}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def _signalled(self, sign, frame):
        sign = signal.Signals(sign)
        if not self.stopped:
            self.stopped = time.monotonic()
            if self.out:
                announce(sign)
            raise SignalException("", sign)
        if is_another(sign, self.stopped) and self._pcontext:
            for pid in self._pcontext.pids().values():
                end(pid)

    def _construct_event(self, state: str, source: EventSource, *details, **more) -> Event:
        """Without what nobody reads: for each event torch looks up this host's name, for a minute or more."""
        return Event(f"torchelastic.worker.status.{state}", source)

    def _monitor_workers(self, group) -> RunResult:
        result = super()._monitor_workers(group)
        if result.state == WorkerState.FAILED and self._remaining_restarts:
            rank = _cause(result.failures)
            if _mistaken(result.failures[rank]) and not self._has_begun():
                self._remaining_restarts = 0                 # it would fail again
            else:
                left = self._remaining_restarts - 1
                print(f"nanoinfra: rank {rank} {_how(result.failures[rank])}; all ranks start again "
                      f"({left} more restart{'s' * (left != 1)})", file=sys.stderr)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """SIGTERM for the ranks, whatever the launcher got, and time to end."""
        super()._shutdown(signal.SIGTERM, timeout)

    def _has_begun(self):
        """Has an attempt of this launch come as far as to describe its run?"""
        return last_config(self.out).get("launch") == self.name


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


def _after_signal(sign, out, argv, started):
    if out is None:
        say(f"stopped by {sign.name}")
    elif (note := out / STOPPED).exists() and note.stat().st_mtime >= started:
        say_where(out, argv)
        return 0
    else:
        saved = checkpoints(out / "checkpoints")
        left = f"the last checkpoint is {saved[-1]}, go on with: {how_to_go_on(argv)}" if saved else (
            "nothing is saved yet")
        say(f"stopped by {sign.name} before the ranks could save; {left}")
    return 128 + sign


def _after_failure(failures, world, out):
    rank = _cause(failures)
    if _mistaken(failures[rank]):
        print(f"nanoinfra: {failures[rank].message}", file=sys.stderr)
        return 2
    remedy = "; --resume goes on from the last checkpoint" if out else ""
    print(f"nanoinfra: rank {rank} {_how(failures[rank])}{remedy}", file=sys.stderr)
    if out and (out / BOARD).exists():
        from nanoinfra.distributed.ledger import Board, hang_report
        positions = Board(out / BOARD, world).positions()
        fate = {r: "was killed" for r, failure in failures.items() if _killed(failure)}
        print(hang_report(positions, lambda r: fate.get(r, "")), file=sys.stderr)
        (out / BOARD).unlink()
    return 1


def _cause(failures):
    """A killed rank is the cause, whatever its neighbours died of; then a mistake that a rank found."""
    return min(failures, key=lambda r: (not _killed(failures[r]), not _mistaken(failures[r]),
                                        failures[r].timestamp))


def _killed(failure):
    return failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM


def _mistaken(failure):
    return failure.exitcode == 2 and Path(failure.error_file).exists()


def _how(failure):
    if _mistaken(failure):
        return f"failed: {failure.message}"
    code = failure.exitcode
    return f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
