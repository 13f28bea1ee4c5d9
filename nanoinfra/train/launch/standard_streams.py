"""stdout and stderr of a command: a training run survives a closed pipe, a closed terminal, an encoding.

`nanoinfra train | head -1` and `| tee log`, where Ctrl-C ends tee first, train on and save. Other commands
end when nobody reads their output any more.
"""
import io
import os
import select
import signal
import sys


def prepare_standard_streams(survive_closed_pipe: bool) -> None:
    """Set up stdout and stderr before anything is written: closed ones become /dev/null, characters that
    the encoding lacks are escaped.

    With `survive_closed_pipe`, later output goes to /dev/null once writing has failed.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:        # else the next file opened would be stdout
        pass
    os.close(fd)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or open(number, "w", closefd=False)
        if survive_closed_pipe:
            raw = io.BufferedWriter(_Lasting(number, "w", closefd=False))
            stream = io.TextIOWrapper(raw, stream.encoding, line_buffering=True)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def stdout_has_reader() -> bool:
    """Whether the other end of stdout is still open."""
    states = select.poll()
    states.register(1, 0)
    return not any(state & (select.POLLERR | select.POLLHUP) for _, state in states.poll(0))


def discard_stdout() -> int:
    """Redirect stdout to /dev/null; returns the exit code of a program that SIGPIPE ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 128 + signal.SIGPIPE


class _Lasting(io.FileIO):
    """A file descriptor that is redirected to /dev/null once it cannot be written."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            other = 3 - self.fileno()
            os.write(other, f"nanoinfra: std{('out', 'err')[self.fileno() - 1]} is gone ({error.strerror}); "
                     "the run goes on\n".encode())
            return len(data)
