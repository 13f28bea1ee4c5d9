"""stdout and stderr of a command: neither a closed pipe, a terminal that is gone nor an encoding ends a run.

`nanoinfra train | head -1` and `| tee log`, where Ctrl-C ends tee first, train on and save. Other commands
write for whoever reads: they end where nobody does.
"""
import io
import os
import select
import signal
import sys


def prepare(lasting: bool) -> None:
    """Before anything is written: what was closed leads to nowhere, and a character can be escaped.

    `lasting`: writing goes on, to nowhere, when it has failed once.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:        # else the next file that is opened is stdout
        pass
    os.close(fd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        if lasting:
            raw = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            stream = io.TextIOWrapper(raw, stream.encoding, line_buffering=True)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def stdout_is_read() -> bool:
    """Is there somebody at the other end?"""
    states = select.poll()
    states.register(1, 0)
    return not any(state & (select.POLLERR | select.POLLHUP) for _, state in states.poll(0))


def give_up_stdout() -> int:
    """Nobody reads: the exit code of a program that SIGPIPE ends; what is left goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE


class _Lasting(io.FileIO):
    """A file descriptor that leads to nowhere once it cannot be written."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            other = 3 - self.fileno()
            os.write(other, f"nanoinfra: std{('out', 'err')[self.fileno() - 1]} is gone ({error.strerror}); "
                     "the run goes on\n".encode())
            return len(data)
