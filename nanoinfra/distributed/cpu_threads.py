"""How many threads a rank computes with: what the user says, else its share of the cores that it may use.

--threads comes first, then OMP_NUM_THREADS and MKL_NUM_THREADS, then the cores that taskset and the control
group (a container's CPU quota) leave, divided by the ranks on this host. More threads than cores take turns:
a product then waits for the thread that has none, and takes ten times as long.
"""
import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")              # where Linux shows control groups


def use_threads(wanted: int | None = None, ranks: int | None = None) -> None:
    """Let torch compute with `wanted` threads, or the default for `ranks` ranks here (all of the run's)."""
    import torch
    threads = wanted or default_threads(ranks_here() if ranks is None else ranks)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def default_threads(ranks: int = 1) -> int:
    """Threads of each of `ranks` ranks on this host: what the environment says, else its share of cores."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = os.environ.get(variable, "").partition(",")[0].strip()   # of a list a number for each level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return max(1, usable_cores() // ranks)


def usable_cores() -> int:
    """The cores that this process may keep busy: those of its affinity, or fewer where a quota says so."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(cpu_quota())))


def cpu_quota(groups: Path = GROUPS, mine: Path = Path("/proc/self/cgroup")) -> float:
    """CPU seconds a second that this process's control groups may take; 1e9 where there is no limit."""
    lines = mine.read_text().splitlines() if mine.exists() else []
    found = [1e9]
    for line in lines:
        _, kinds, inside = line.split(":", 2)
        if kinds == "" or "cpu" in kinds.split(","):
            top = groups / kinds             # version 2 has one tree, and no kinds
            folder = top / inside.strip("/")
            found += [_quota(each) for each in (folder, *folder.parents) if each.is_relative_to(top)]
    return min(found)


def _quota(folder):
    """Of one group: version 2 writes "200000 100000" or "max 100000", version 1 two files, -1 for none."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip()
                             for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else 1e9
    except (OSError, ValueError):            # not readable here, or no limit is kept there
        return 1e9


def ranks_here() -> int:
    """Ranks of this run on this host; 1 in a plain process."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    from nanoinfra.distributed.mesh import world_size
    return world_size()
