"""The processes that tests start: wait for what they do, however slow the machine, and end all of it.

Linux lists them in /proc, with the time each has spent, and with the mark that a test puts into its
environment and that all below it inherit. Elsewhere only children that were waited for can be counted.
"""
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARK = "NANOINFRA_TEST"                      # names the test in the environment of all that it starts
PATIENCE = 60.0                              # seconds without any work that are a hang
ENDS = 5.0                                   # seconds without any in which a process that ends has ended
TICKS = os.sysconf("SC_CLK_TCK")
KERNEL = 0x00200000                          # PF_KTHREAD: a thread of the kernel has no environment


@contextmanager
def started(argv: list, **more) -> Iterator[subprocess.Popen]:
    """A program that ends with the `with`, and with it all that it has started; `more` is for Popen."""
    mark = f"{os.environ.get(MARK, '')} {time.monotonic_ns()}"
    before = running()
    more["env"] = {**more.get("env", os.environ), MARK: mark}
    with subprocess.Popen([*map(str, argv)], **more) as process:
        try:
            yield process
        finally:
            process.kill()
            end(lambda: [pid for pid in running() - before if marked(pid, mark) and alive(pid)])


def until(true: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    """Wait until `true()`. Fails where `process` has ended, or nothing below this one works for a minute.

    A slow machine may take its time; what is busy for ever is ended by pytest's own limit.
    """
    work = since = looked = 0.0
    while not true():
        assert process is None or process.poll() is None, process.communicate()[1]
        now = time.monotonic()
        if now > looked + PATIENCE / 60:     # seldom: it reads much of /proc
            looked, spent = now, below()
            if not since or spent > work + 0.1:
                work, since = spent, now
            assert now < since + PATIENCE, "nothing happens"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Does `pid` run? A zombie, which only waits to be waited for, does not."""
    return (_stat(pid) or "Z")[0] not in "ZX"


def gone(pids: list[int], work: float = math.inf) -> list[int]:
    """Wait for the end of `pids` while they work, but no more than `work` CPU seconds; those that stay."""
    most, last, since = work + sum(map(_spent, pids)), -1.0, time.monotonic()
    while any(map(alive, pids)):
        if (spent := sum(map(_spent, pids))) > last:
            last, since = spent, time.monotonic()
        if spent > most or time.monotonic() > since + ENDS:
            break
        time.sleep(0.01)
    return [pid for pid in pids if alive(pid)]


def end(left: Callable[[], list[int]]) -> None:
    """Kill what is left until nothing is: a process that ends may just have started another."""
    while pids := left():
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that run."""
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):              # the thread ended between the two
            found += map(int, listed.read_text().split())
    return [child for child in found if alive(child)]


def descendants(pid: int) -> list[int]:
    """All that run below `pid`, parents first."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def running() -> set[int]:
    """The process ids of this machine, none where there is no /proc."""
    return set(map(int, filter(str.isdigit, os.listdir("/proc")))) if os.path.exists("/proc") else set()


def marked(pid: int, mark: str) -> bool:
    """Has `pid` `mark`, or one that begins with it, in its environment?"""
    return any(variable.startswith(f"{MARK}={mark}".encode()) for variable in _environment(pid).split(b"\0"))


def _environment(pid):
    """What /proc says. It says nothing for a moment, while a program starts in the place of another."""
    for _ in range(100):
        try:
            found = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:                      # it is no more, or another user's
            return b""
        stat = _stat(pid)
        if found or not stat or stat[0] in "ZX" or int(stat[6]) & KERNEL:
            break
        time.sleep(0.001)
    return found


def parent(pid: int) -> int | None:
    """The process that `pid` is a child of; None where it is no more."""
    return int(stat[1]) if (stat := _stat(pid)) else None


def below() -> float:
    """CPU seconds, user's and system's, of all that this process has started, if they still run or not."""
    return sum(os.times()[2:4]) + sum(map(_spent, descendants(os.getpid())))


def command(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
    except OSError:
        return "ended"


def _spent(pid):
    """Of a process and of those that it has waited for."""
    return sum(map(int, (_stat(pid) or ["0"] * 15)[11:15])) / TICKS


def _stat(pid):
    """The fields of /proc/PID/stat from the state on; None where the process is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None

