"""Handling of SIGINT (Ctrl-C), SIGTERM and SIGHUP (terminal closed), on one rank and under a launcher.

While there is nothing to save, the command exits at once with one line and code 128 + the signal's number. A
run in training finishes its step, saves a checkpoint, prints where, and exits with 0; a second signal ends it
at once. A signal that is ignored, as nohup ignores SIGHUP, stays ignored. A thread receives the signals:
Python's own handlers would wait for C code, such as a backward or a collective that does not end.
"""
import _thread
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress

TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_SIGNAL_SECONDS = 0.5  # signals this close count as one: `timeout` sends two


class SignalListener:
    """A thread that calls `on_signal(sign)`, from `start` to `stop`, for each termination signal not ignored.

    A listener that starts later takes the signals over. It receives nothing when it was not started in the
    main thread, and no signal for which other code has set a handler meanwhile.
    """

    def __init__(self, on_signal: Callable[[signal.Signals], object]):
        self.on_signal, self.before = on_signal, {}
        self.pipe = None

    def start(self) -> "SignalListener":
        """Begin to receive signals; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            self.pipe, self.end = socket.socketpair()
            self.end.setblocking(False)
            self.old_fd = signal.set_wakeup_fd(self.end.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self._listen, name="hears signals", daemon=True)
            self.thread.start()
            signs = termination_signals_not_ignored()
            self.before = {sign: signal.signal(sign, self.handle) for sign in signs}
        return self

    def stop(self) -> None:
        """Restore the signal handlers that were set before `start`."""
        if self.pipe:
            for sign, handler in self.before.items():
                signal.signal(sign, handler)
            signal.set_wakeup_fd(self.old_fd)
            self.end.close()
            self.thread.join()
            self.pipe.close()

    def handle(self, sign: int, frame) -> None:
        """Python's own handler, called in the main thread; the thread has received the signal already."""

    def _listen(self):
        while came := self.pipe.recv(1):
            if signal.getsignal(came[0]) == self.handle:
                self.on_signal(signal.Signals(came[0]))


class StopRequest(SignalListener):
    """During training, the first signal sets `requested`, which the run reads once a step.

    A second signal goes to the handler of before, so that it ends the process or raises KeyboardInterrupt in
    a program that calls `train`. In a rank of a launcher (`is_single_process` False) every signal counts as
    the first: the launcher decides.
    """

    def __init__(self, is_single_process: bool):
        super().__init__(self._request)
        self.is_single_process = is_single_process
        self.requested, self.requested_at = 0, 0.0

    def _request(self, sign):
        if not self.requested:
            self.requested, self.requested_at = 1, time.monotonic()
            announce_stop(sign)
        elif self.requested == 1 and self.is_single_process and is_second_signal(sign, self.requested_at):
            outer = getattr(self.before[sign], "__self__", None)
            if isinstance(outer, SignalListener):
                outer.on_signal(sign)
            self.requested = 2
            _thread.interrupt_main(sign)     # again, for `handle` to raise it

    def handle(self, sign: int, frame) -> None:
        """Python's own handler, in the main thread; raises a second signal for the handler of before."""
        if self.requested == 2:
            signal.signal(sign, self.before[sign])
            signal.raise_signal(sign)


def is_second_signal(sign: int, first_at: float) -> bool:
    """Whether this is a second signal, after one at `first_at`; a closing terminal sends many SIGHUPs."""
    return sign != signal.SIGHUP and time.monotonic() > first_at + _SAME_SIGNAL_SECONDS


def ignore_termination_signals() -> None:
    """Ignore termination signals while the interpreter exits, as it drops the handlers before its end."""
    for sign in TERMINATION_SIGNALS:
        signal.signal(sign, signal.SIG_IGN)


def termination_signals_not_ignored() -> list[signal.Signals]:
    """The termination signals that this process was not started to ignore."""
    return [sign for sign in TERMINATION_SIGNALS if signal.getsignal(sign) is not signal.SIG_IGN]


def announce_stop(sign: signal.Signals) -> None:
    """Print that the run stops after this step and saves a checkpoint."""
    if sign == signal.SIGHUP:
        redirect_terminal_to_devnull()
    if is_reporting_process():
        write_line_to_stderr(f"{sign.name}: the run stops after this step and is saved ...; a second signal "
                             "ends it at once")


def exit_immediately(sign: signal.Signals) -> None:
    """Print one line and end this process with code 128 + the signal's number, without saving."""
    if sign == signal.SIGHUP:
        redirect_terminal_to_devnull()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")            # the cursor, which a progress bar hides
    if is_reporting_process():
        write_line_to_stderr(f"stopped by {sign.name}")
    os._exit(128 + sign)


def write_line_to_stderr(text: str) -> None:
    """Write one line to stderr, from any thread; on a terminal below the ^C that it shows."""
    with suppress(OSError):                  # when nobody reads the pipe any more
        os.write(2, f"{os.isatty(2) * chr(10)}nanoinfra: {text}\n".encode())


def is_reporting_process() -> bool:
    """Whether this process reports on the run: rank 0, or a launcher of ours instead of its ranks."""
    from nanoinfra.train.launch.elastic_rank import is_launched_rank, launched_by_nanoinfra
    return not is_launched_rank() or (os.environ["RANK"] == "0" and not launched_by_nanoinfra())


def redirect_terminal_to_devnull() -> None:
    """Redirect stdout and stderr to /dev/null when their terminal is gone, so that writing does not fail."""
    for fd in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
