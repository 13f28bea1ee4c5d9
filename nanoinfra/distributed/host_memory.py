"""How much memory this machine lets a process have, and how much this process has had.

The first is the machine's, or less where a control group sets a limit. It is the whole, not what is free this
second: pages of files give way, other programs end, and what is refused must not depend on the moment. Swap
is not counted: a training in it stands still. cgroup v2: memory.max of a group and of all above it; v1:
memory.limit_in_bytes. Asked before any rank starts, so this file needs no torch.
"""
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def host_memory(cgroups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that all processes of this machine, or of this container, can have together."""
    return min([psutil.virtual_memory().total, *limits(cgroups, mine)])


def free_memory() -> int:
    """Bytes that could be had this second without swapping."""
    return psutil.virtual_memory().available


def resident_peak() -> int:
    """The most memory this process ever held, in bytes, as the operating system counts it.

    Linux says so of the program itself in VmHWM; `ru_maxrss` there begins with what its parent had.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status")))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limits(cgroups: Path, mine: Path) -> Iterator[int]:
    """The limits, in bytes, of the groups in /proc/self/cgroup that `mine` is, and of those above them."""
    for line in _text(mine).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _upwards(cgroups, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(cgroups / "memory", group, "memory.limit_in_bytes")


def _upwards(root, group, name):
    """A group may be named as seen from outside of a container, so folders that are not there are passed."""
    inside = PurePosixPath(group.lstrip("/"))
    for folder in (inside, *inside.parents):
        limit = _text(root / folder / name).strip()
        if limit.isdigit():                  # "max" is none
            yield int(limit)


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""
