"""Run an untrusted program with limits on time, memory and output, and end every process that it started.

The program answers with lines on a pipe, so that neither its exit code nor its prints are an answer. On Linux
the caller adopts orphaned processes (PR_SET_CHILD_SUBREAPER) and ends them too; elsewhere they are not found.
This is no sandbox: the program can read, write and reach whatever its user can.
"""
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1                                   # options of Linux's prctl
_PR_SET_CHILD_SUBREAPER = 36
_CHECK_INTERVAL_SECONDS = 0.25                         # between two checks of time and memory
_KILL_TIMEOUT_SECONDS = 30.0                           # until killed processes must be gone
_KILL_POLL_SECONDS = 0.01                              # between two looks whether they are
_MAX_NEW_TASKS_WHILE_RUNNING = 200                     # new processes and threads before all are stopped
_KEPT_VARIABLES = {"PATH", "HOME", "LANG", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV"}
_KEPT_VARIABLE_PREFIXES = ("LC_", "PYTHON", "OMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "ATEN_", "TORCH",
                           "TRITON_", "CUDA_", "NCCL_")


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of an untrusted program."""
    seconds_per_line: float = 180.0             # until its next line
    memory_bytes: int = 4 << 30              # resident, with all that it started; shared pages count once
    line_bytes: int = 256 << 10              # of one line
    kept_output_bytes: int = 4 << 10              # of its output, the rest is dropped
    max_processes: int = 500               # at a time, zombies included


class ProcessGaveNoLine(Exception):
    """The program gave no further line, because it ended or was past a limit: the text says which."""


class LimitedProcess:
    """A context manager that runs `command` and, at its end, kills it and all processes that it started.

    The program runs in an empty temporary folder, with an environment without secrets. Its stdin is one JSON
    object: `request` and {"pipe": the file descriptor to which it writes its lines}.
    """

    def __init__(self, command: list[str], request: dict, limits: ProcessLimits):
        self.command, self._request, self.limits = command, request, limits
        self.printed_bytes = 0                               # bytes
        self._kept, self._answers = b"", b""

    def __enter__(self):
        self._others, self._tasks = set(psutil.Process().children()), _tasks()
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._folder = tempfile.TemporaryDirectory(prefix="g-", ignore_cleanup_errors=True)   # sockets: short
        self._pipe, theirs = os.pipe()
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            pass_fds=[theirs], cwd=self._folder.name, env=environment_without_secrets(self._folder.name),
            start_new_session=True)
        os.close(theirs)
        self._open = [self._pipe, self._process.stdout.fileno()]
        for descriptor in self._open:
            os.set_blocking(descriptor, False)
        with suppress(BrokenPipeError), self._process.stdin as stdin:      # line() says that it has ended
            stdin.write(json.dumps(self._request | {"pipe": theirs}).encode())
        return self

    def __exit__(self, *_):
        try:
            self._end()
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0)
            if self._open:
                self._read()                           # the last words
            self._process.stdout.close()
            os.close(self._pipe)
            self._folder.cleanup()

    def read_line(self) -> bytes:
        """Wait for the program's next line. Raises ProcessGaveNoLine if it ended or is past a limit."""
        began = looked = time.monotonic()
        while b"\n" not in self._answers:
            gone = self._process.poll()                # before the last read, so that nothing is missed
            self._read()
            if len(self._answers) > self.limits.line_bytes:
                raise ProcessGaveNoLine(f"wrote more than {self.limits.line_bytes:,} bytes without an end of "
                                        "line")
            if gone is not None and b"\n" not in self._answers:
                raise ProcessGaveNoLine(f"ended its process {_how(gone)}")
            if (now := time.monotonic()) - looked > _CHECK_INTERVAL_SECONDS:
                looked = now
                self._look(now - began)
        line, _, self._answers = self._answers.partition(b"\n")
        return line

    @property
    def captured_output(self) -> str:
        """The first bytes of its stdout and stderr, as text."""
        more = f" ... ({self.printed_bytes:,} bytes in all)" if self.printed_bytes > len(self._kept) else ""
        return self._kept.decode(errors="replace") + more

    def _read(self):
        ready, _, _ = select.select(self._open, [], [], _CHECK_INTERVAL_SECONDS)  # none is open: it waits
        for descriptor in ready:
            data = os.read(descriptor, 1 << 16)
            if not data:
                self._open.remove(descriptor)
            elif descriptor == self._pipe:
                self._answers += data
            else:
                self.printed_bytes += len(data)
                self._kept += data[:self.limits.kept_output_bytes - len(self._kept)]

    def _look(self, seconds):
        if seconds > self.limits.seconds_per_line:
            raise ProcessGaveNoLine(f"gave no answer within {self.limits.seconds_per_line:g} s")
        with self._standing_still():
            if len(family := self._family()) > self.limits.max_processes:
                raise ProcessGaveNoLine(f"has more than {self.limits.max_processes} processes")
            for exact in (False, True):                # what is exact is slow, so only where it decides
                used = sum(_memory(process, exact) for process in family)
                if used <= self.limits.memory_bytes:
                    return
        raise ProcessGaveNoLine(f"took {used / 2**20:,.0f} MiB of memory, more than "
                                f"{self.limits.memory_bytes / 2**20:,.0f}")

    @contextmanager
    def _standing_still(self):
        """Stop the program while its memory is counted, if there are so many processes that this is slow."""
        crowd = _tasks() - self._tasks > _MAX_NEW_TASKS_WHILE_RUNNING
        if crowd:
            self._signal_group(signal.SIGSTOP)
        yield
        if crowd:
            self._signal_group(signal.SIGCONT)

    def _family(self):
        """The program's process and all that it started, orphans too; not the caller's other children."""
        every = psutil.Process().children(recursive=True)              # one look at all processes there are
        parents, others = {each.pid: _parent(each) for each in every}, {each.pid for each in self._others}

        def is_ours(pid):
            while pid in parents and pid not in others:
                pid = parents[pid]
            return pid not in others
        return {each for each in every if is_ours(each.pid)}

    def _end(self):
        end, stopped = time.monotonic() + _KILL_TIMEOUT_SECONDS, set()
        self._signal_group(signal.SIGKILL)
        while (running := self._family() - stopped) and time.monotonic() < end:
            _signal(running, signal.SIGSTOP)           # who is stopped starts no others meanwhile,
            stopped |= running                         # nor does a group that is signalled in one call
        while family := self._family():
            _signal(family, signal.SIGKILL)
            for process in family:
                with suppress(ChildProcessError):      # of another that is dying: it will be ours
                    os.waitpid(process.pid, os.WNOHANG)
            if time.monotonic() > end:
                raise RuntimeError(f"{len(family)} processes cannot be ended, as {next(iter(family)).pid}")
            time.sleep(_KILL_POLL_SECONDS)
        self._process.wait()

    def _signal_group(self, number):
        """Signal its process group in one call, because it may fork faster than we look."""
        if self._process.poll() is None:               # else its number may be another's by now
            os.killpg(self._process.pid, number)


def environment_without_secrets(folder: str) -> dict[str, str]:
    """The variables of this environment that a program needs, with PYTHONPATH and TMPDIR=`folder`."""
    kept = {name: value for name, value in os.environ.items()
            if name in _KEPT_VARIABLES or name.startswith(_KEPT_VARIABLE_PREFIXES)}
    paths = [str(Path(__file__).resolve().parents[3]), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    return kept | {"TMPDIR": folder, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def prctl(option: int, value: int) -> None:
    """Call Linux's prctl for this process; elsewhere do nothing. Raises OSError."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def _tasks():
    """The number of processes and threads on this machine; 0 where that is not known."""
    path = Path("/proc/loadavg")
    return int(path.read_text().split()[3].partition("/")[2]) if path.exists() else 0


def _memory(process, exact):
    try:
        used = process.memory_full_info() if exact else process.memory_info()
    except psutil.Error:                               # it has just ended, or is not ours to read
        return 0
    return getattr(used, "pss", used.rss)


def _parent(process):
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return 0


def _signal(processes, number):
    """Signal each process, and its whole group in one call, because it may fork faster than we look."""
    for group in {_group(process) for process in processes} - {os.getpgrp(), None}:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
    for process in processes:
        with suppress(psutil.Error):                   # gone, or another user's: then it is said at the end
            process.send_signal(number)


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def _how(code):
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}, which is no answer"
