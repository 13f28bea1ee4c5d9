"""Start N ranks of a command on this host, with torch's elastic agent, and report how they ended.

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

from nanoinfra.distributed.cpu_threads import default_threads_per_rank
from nanoinfra.distributed.loopback_tcp_store import LOOPBACK_HOST, start_loopback_store
from nanoinfra.train.checkpoint.save_and_load import list_checkpoints
from nanoinfra.train.launch.elastic_rank import (
    ELASTIC_LOGS_FOLDER,
    LAUNCH_ID_PREFIX,
    STATUS_BOARD_FILE,
    STOP_NOTE_FILE,
    kill_process,
    make_run_folder,
)
from nanoinfra.train.launch.stop_message import report_stopped_run, resume_command
from nanoinfra.train.launch.stop_signals import (
    announce_stop,
    is_second_signal,
    termination_signals_not_ignored,
    write_line_to_stderr,
)
from nanoinfra.train.run_directory.check_out_folder import read_run_config

_SAVE_TIMEOUT_SECONDS = 300  # that ranks have to save when a signal stops the run


def launch_ranks(argv: list[str], nproc: int, out: Path | None = None, max_restarts: int = 0,
                 module: str = "nanoinfra.cli") -> int:
    """Run `python -m MODULE ARGV` on `nproc` ranks, in the run directory `out` if there is one.

    Returns the exit code: 0, 2 for a user's mistake, 1 for a failed rank, 128 + its number after a signal.
    """
    if out:
        make_run_folder(out)
    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(default_threads_per_rank(nproc)))
    started, rendezvous = time.time(), LoopbackRendezvous(LAUNCH_ID_PREFIX + uuid.uuid4().hex[:8])
    spec = WorkerSpec("rank", nproc, rendezvous, entrypoint=sys.executable, max_restarts=max_restarts,
                      args=("-m", module, *argv), monitor_interval=0.1)
    with _logs_folder(out) as folder:
        agent = ElasticRankAgent(spec, DefaultLogsSpecs(str(folder)), out)
        try:
            with agent.handle_stop_signals():
                failures = agent.run().failures
        except SignalException as stop:
            return _after_signal(stop.sigval, out, argv, started)
        finally:
            rendezvous.shutdown()
        return _after_failure(failures, nproc, out) if failures else 0


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of one elastic agent, whose ranks meet at a store on loopback.

    torch's own c10d rendezvous listens on every interface and unpickles what it finds in its store.
    """
    use_agent_store = True                   # the ranks use this store and start none

    def __init__(self, run_id: str):
        self.run_id, self.store = run_id, start_loopback_store()

    def next_rendezvous(self) -> RendezvousInfo:
        """Return that this is agent 0 of 1, with a store in memory, and the address of the ranks' store."""
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK_HOST, self.store.port))

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


class ElasticRankAgent(LocalElasticAgent):
    """torch's elastic agent, which watches the ranks and restarts them; it also prints why."""

    def __init__(self, spec: WorkerSpec, logs: DefaultLogsSpecs, out: Path | None):
        super().__init__(spec, logs, shutdown_timeout=_SAVE_TIMEOUT_SECONDS)
        self.launch_id, self.out = spec.rdzv_handler.get_run_id(), out
        self.stopped_at = 0.0                # time of the first signal; 0: none yet

    @contextmanager
    def handle_stop_signals(self):
        """Within the `with`, a first signal lets the ranks save and end, and a second one kills them."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""                # without torch's own handlers
        is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
        before = {sign: signal.signal(sign, self._signalled) for sign in termination_signals_not_ignored()
                  if is_main}
        try:
            yield
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)

    def _signalled(self, sign, frame):
        sign = signal.Signals(sign)
        if not self.stopped_at:
            self.stopped_at = time.monotonic()
            if self.out:
                announce_stop(sign)
            raise SignalException("", sign)
        if is_second_signal(sign, self.stopped_at) and self._pcontext:
            for pid in self._pcontext.pids().values():
                kill_process(pid)

    def _construct_event(self, state: str, source: EventSource, *details, **more) -> Event:
        """Make the event without this host's name, whose look-up may take torch a minute for each event."""
        return Event(f"torchelastic.worker.status.{state}", source)

    def _monitor_workers(self, group) -> RunResult:
        result = super()._monitor_workers(group)
        if result.state == WorkerState.FAILED and self._remaining_restarts:
            rank = _cause(result.failures)
            if _mistaken(result.failures[rank]) and not self._has_begun():
                self._remaining_restarts = 0                 # it would fail the same way again
            else:
                left = self._remaining_restarts - 1
                print(f"nanoinfra: rank {rank} {_how(result.failures[rank])}; all ranks start again "
                      f"({left} more restart{'s' * (left != 1)})", file=sys.stderr)
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Send the ranks SIGTERM, whichever signal the launcher got, and wait for them to end."""
        super()._shutdown(signal.SIGTERM, timeout)

    def _has_begun(self):
        """Whether an attempt of this launch has come as far as writing config.json."""
        return read_run_config(self.out).get("launch") == self.launch_id


@contextmanager
def _logs_folder(out):
    """An empty folder for the files of torch's agent, removed at the end; a killed run may have left one."""
    folder = out / ELASTIC_LOGS_FOLDER if out else Path(tempfile.mkdtemp(prefix=LAUNCH_ID_PREFIX))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _after_signal(sign, out, argv, started):
    if out is None:
        write_line_to_stderr(f"stopped by {sign.name}")
    elif (note := out / STOP_NOTE_FILE).exists() and note.stat().st_mtime >= started:
        report_stopped_run(out, argv)
        return 0
    else:
        saved = list_checkpoints(out / "checkpoints")
        left = f"the last checkpoint is {saved[-1]}, go on with: {resume_command(argv)}" if saved else (
            "nothing is saved yet")
        write_line_to_stderr(f"stopped by {sign.name} before the ranks could save; {left}")
    return 128 + sign


def _after_failure(failures, world, out):
    rank = _cause(failures)
    if _mistaken(failures[rank]):
        print(f"nanoinfra: {failures[rank].message}", file=sys.stderr)
        return 2
    remedy = "; --resume goes on from the last checkpoint" if out else ""
    print(f"nanoinfra: rank {rank} {_how(failures[rank])}{remedy}", file=sys.stderr)
    if out and (out / STATUS_BOARD_FILE).exists():
        from nanoinfra.distributed.rank_status_board import StatusBoard, hang_report
        positions = StatusBoard(out / STATUS_BOARD_FILE, world).read_statuses()
        fate = {r: "was killed" for r, failure in failures.items() if _killed(failure)}
        print(hang_report(positions, lambda r: fate.get(r, "")), file=sys.stderr)
        (out / STATUS_BOARD_FILE).unlink()
    return 1


def _cause(failures):
    """The rank that failed first: a killed one, else one that found a user's mistake, else by time."""
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
