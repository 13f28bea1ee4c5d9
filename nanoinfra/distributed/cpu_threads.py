"""The number of CPU threads of a rank: the user's choice, else its share of the cores that it may use.

--threads comes first, then OMP_NUM_THREADS and MKL_NUM_THREADS, then the cores that taskset and the control
group (a container's CPU quota) leave, divided by the ranks on this host. With more threads than cores, each
matrix product waits for a thread that has no core, and takes ten times as long.
"""
import os
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def set_torch_threads(num_threads: int | None = None, ranks_on_host: int | None = None) -> None:
    """Let torch compute with `num_threads`, or with the default for so many ranks on this host."""
    import torch
    ranks_on_host = local_world_size() if ranks_on_host is None else ranks_on_host
    threads = num_threads or default_threads_per_rank(ranks_on_host)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def default_threads_per_rank(ranks_on_host: int = 1) -> int:
    """Threads of each of the ranks on this host: what the environment says, else its share of the cores."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = os.environ.get(variable, "").partition(",")[0].strip()   # a list has one for each level
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return max(1, usable_cpu_cores() // ranks_on_host)


def usable_cpu_cores() -> int:
    """The number of cores that this process may use: of its CPU affinity, or fewer by a cgroup's quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(_cgroup_cpu_quota())))


def _cgroup_cpu_quota(cgroup_root: Path = _CGROUP_ROOT,
                      own_cgroups_file: Path = Path("/proc/self/cgroup")) -> float:
    """CPU seconds a second that this process's control groups may use; 1e9 where there is no limit."""
    lines = own_cgroups_file.read_text().splitlines() if own_cgroups_file.exists() else []
    found = [1e9]
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            top = cgroup_root / controllers  # version 2 has one tree, and no controllers here
            folder = top / inside.strip("/")
            found += [_quota(each) for each in (folder, *folder.parents) if each.is_relative_to(top)]
    return min(found)


def _quota(folder):
    """Quota of one group. Version 2 writes "200000 100000" or "max 100000"; version 1 two files, or -1."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip()
                             for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else 1e9
    except (OSError, ValueError):            # not readable, or the group has no limit
        return 1e9


def local_world_size() -> int:
    """Number of ranks of this run on this host; 1 in a plain process."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    from nanoinfra.distributed.mesh import world_size
    return world_size()
