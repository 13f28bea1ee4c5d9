"""The memory limit of this host (CPU RAM), the memory that is available, and this process's peak RSS.

The limit is the machine's memory, or less where a control group (cgroup) sets a limit. It does not depend on
what is free at the moment: the page cache shrinks, other programs end, and the same run must be refused or
accepted each time. Swap is not counted, because a training run that swaps makes no progress. cgroup v2:
memory.max of a group and of all above it; v1: memory.limit_in_bytes. This file needs no torch.
"""
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil


def host_memory_limit_bytes(cgroup_root: Path = Path("/sys/fs/cgroup"),
                            own_cgroups_file: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that all processes of this machine, or of this container, can have together."""
    return min([psutil.virtual_memory().total, *_cgroup_memory_limits(cgroup_root, own_cgroups_file)])


def available_memory_bytes() -> int:
    """Bytes that could be allocated at this moment without swapping."""
    return psutil.virtual_memory().available


def peak_rss_bytes() -> int:
    """This process's peak resident set size (RSS) in bytes, as the operating system counts it.

    On Linux it is VmHWM of /proc; `ru_maxrss` starts there from the parent process's peak.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", _text(Path("/proc/self/status")))
    unit = 1 if sys.platform == "darwin" else 1024
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cgroup_memory_limits(cgroup_root: Path, own_cgroups_file: Path) -> Iterator[int]:
    """The limits in bytes of the control groups that the file names, and of those above them."""
    for line in _text(own_cgroups_file).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _upwards(cgroup_root, group, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _upwards(cgroup_root / "memory", group, "memory.limit_in_bytes")


def _upwards(root, group, name):
    """A group may be named as seen from outside of a container, so missing folders are skipped."""
    inside = PurePosixPath(group.lstrip("/"))
    for folder in (inside, *inside.parents):
        limit = _text(root / folder / name).strip()
        if limit.isdigit():                  # "max" is no limit
            yield int(limit)


def _text(path):
    try:
        return path.read_text()
    except OSError:
        return ""
