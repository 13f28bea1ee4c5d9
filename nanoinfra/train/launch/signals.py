"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone): one rule, on one rank and under a launcher.

While there is nothing to save, the command ends at once: one line, exit code 128 + the signal's number. A run
that trains finishes its step, saves, says where, and ends with 0; a second signal ends it at once. A signal
that is ignored, as nohup ignores SIGHUP, stays ignored. A thread hears them: Python's own handlers would wait
for C code, for a tokenizer to be built, a backward, a rank that does not come.
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

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 0.5                                   # seconds in which signals are one: `timeout` sends two at once


class Hearing:
    """From `start` to `stop` a thread calls `heard(sign)` for each signal that comes and is not ignored.

    One that starts later takes the signals over. It hears nothing where the main thread did not start it, nor
    what somebody has set a handler of his own for meanwhile.
    """

    def __init__(self, heard: Callable[[signal.Signals], object]):
        self.heard, self.before, self.pipe = heard, {}, None

    def start(self) -> "Hearing":
        """Hear signals from here on."""
        if threading.current_thread() is threading.main_thread():
            self.pipe, self.end = socket.socketpair()
            self.end.setblocking(False)
            self.old_fd = signal.set_wakeup_fd(self.end.fileno(), warn_on_full_buffer=False)
            self.thread = threading.Thread(target=self._listen, name="hears signals", daemon=True)
            self.thread.start()
            self.before = {sign: signal.signal(sign, self.handle) for sign in not_ignored()}
        return self

    def stop(self) -> None:
        """Give them back to who had them."""
        if self.pipe:
            for sign, handler in self.before.items():
                signal.signal(sign, handler)
            signal.set_wakeup_fd(self.old_fd)
            self.end.close()
            self.thread.join()
            self.pipe.close()

    def handle(self, sign: int, frame) -> None:
        """Python's handler, in the main thread: the signal was heard already."""

    def _listen(self):
        while came := self.pipe.recv(1):
            if signal.getsignal(came[0]) == self.handle:
                self.heard(signal.Signals(came[0]))


class StopRequest(Hearing):
    """While a run trains: the first signal sets `asked`, which the run looks at once a step.

    A second one goes to whoever heard them before, and so does Python's KeyboardInterrupt in a program that
    calls `train`. A rank, of a launcher that decides, takes any number as one.
    """

    def __init__(self, lone: bool):
        super().__init__(self._ask)
        self.lone, self.asked, self.since = lone, 0, 0.0

    def _ask(self, sign):
        if not self.asked:
            self.asked, self.since = 1, time.monotonic()
            announce(sign)
        elif self.asked == 1 and self.lone and is_another(sign, self.since):
            outer = getattr(self.before[sign], "__self__", None)
            if isinstance(outer, Hearing):
                outer.heard(sign)
            self.asked = 2
            _thread.interrupt_main(sign)     # once more, now that `handle` knows

    def handle(self, sign: int, frame) -> None:
        """Python's handler, in the main thread."""
        if self.asked == 2:
            signal.signal(sign, self.before[sign])
            signal.raise_signal(sign)


def is_another(sign: int, since: float) -> bool:
    """Is it a second signal, when the first came at `since`? Of SIGHUP a terminal that goes sends several."""
    return sign != signal.SIGHUP and time.monotonic() > since + SAME


def ignore_from_here_on() -> None:
    """Nothing is left to end but Python itself, whose last moments drop handlers."""
    for sign in ENDING:
        signal.signal(sign, signal.SIG_IGN)


def not_ignored() -> list[signal.Signals]:
    """Of the signals that end a run those that this process was not started to ignore."""
    return [sign for sign in ENDING if signal.getsignal(sign) is not signal.SIG_IGN]


def announce(sign: signal.Signals) -> None:
    """Say at once that the run will end, when it has saved."""
    if sign == signal.SIGHUP:
        leave_terminal()
    if speaks_for_all():
        say(f"{sign.name}: the run stops after this step and is saved ...; a second signal ends it at once")


def end_at_once(sign: signal.Signals) -> None:
    """End this process: nothing is left to save, or nobody wants to wait for it."""
    if sign == signal.SIGHUP:
        leave_terminal()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h")            # the cursor, which a progress bar hides
    if speaks_for_all():
        say(f"stopped by {sign.name}")
    os._exit(128 + sign)


def say(text: str) -> None:
    """One line on stderr, from any thread; on a terminal below the ^C that it shows."""
    with suppress(OSError):                  # of a pipe that nobody reads any more
        os.write(2, f"{os.isatty(2) * chr(10)}nanoinfra: {text}\n".encode())


def speaks_for_all() -> bool:
    """Does this process say what happens to the run? Of ranks the first, unless our launcher does."""
    from nanoinfra.train.launch.elastic_rank import is_rank, launched_by_us
    return not is_rank() or (os.environ["RANK"] == "0" and not launched_by_us())


def leave_terminal() -> None:
    """Let a process whose terminal is gone write to nowhere, instead of failing."""
    for fd in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
