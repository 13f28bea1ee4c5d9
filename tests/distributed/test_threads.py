"""One rule for the threads of a rank: the flag, the environment, the cores that it may use."""
import os
from pathlib import Path

import pytest
import torch

from nanoinfra.distributed import cpu_threads
from nanoinfra.distributed.cpu_threads import cpu_quota, default_threads, usable_cores, use_threads
from nanoinfra.serve.processes.engine_processes import environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cores(monkeypatch):
    """A machine of 8 cores without a quota, and an environment that says nothing."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpu_threads, "cpu_quota", lambda: 1e9)
    return monkeypatch


def test_ranks_share_the_cores(cores):
    assert [default_threads(n) for n in (1, 2, 3, 16)] == [8, 4, 2, 1]


def test_taskset_limits_them(cores):
    cores.setattr("os.sched_getaffinity", lambda pid: {5})
    assert usable_cores() == 1 and default_threads(1) == 1
    assert environment(1)["OMP_NUM_THREADS"] == "1"          # of an engine of `serve`


def test_a_quota_limits_them(cores):
    cores.setattr(cpu_threads, "cpu_quota", lambda: 2.5)
    assert usable_cores() == 2
    cores.setattr(cpu_threads, "cpu_quota", lambda: 0.5)
    assert usable_cores() == 1


@pytest.mark.parametrize("said, want", [({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "4,2"}, 4),
                                        ({"MKL_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "0"}, 4),
                                        ({"OMP_NUM_THREADS": "many"}, 4),
                                        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "6"}, 1)])
def test_the_environment_comes_before_the_cores(cores, said, want):
    for name, value in said.items():
        cores.setenv(name, value)
    assert default_threads(2) == want


def test_the_flag_comes_first(cores):
    cores.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    try:
        use_threads(2)
        assert torch.get_num_threads() == 2
        use_threads()
        assert torch.get_num_threads() == 3
        cores.delenv("OMP_NUM_THREADS")
        cores.setenv("LOCAL_WORLD_SIZE", "2")
        use_threads()
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


GROUPS = {
    "version 2": ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
    "version 2, a container's own": ("0::/\n", {"cpu.max": "200000 100000"}, 2.0),
    "version 1": ("2:cpu,cpuacct:/c\n1:memory:/c\n", {"cpu,cpuacct/c/cpu.cfs_quota_us": "300000",
                                                      "cpu,cpuacct/c/cpu.cfs_period_us": "100000"}, 3.0),
    "version 1, a container's own": ("2:cpu:/docker/12ab\n", {"cpu/cpu.cfs_quota_us": "50000",
                                                              "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    "no limit": ("0::/\n1:cpu:/\n", {"cpu.max": "max 100000", "cpu/cpu.cfs_quota_us": "-1",
                                     "cpu/cpu.cfs_period_us": "100000"}, 1e9),
    "nothing there": ("0::/\n", {}, 1e9),
}


@pytest.mark.parametrize("mine, files, want", GROUPS.values(), ids=GROUPS.keys())
def test_quota_of_control_groups(tmp_path, mine, files, want):
    (tmp_path / "mine").write_text(mine)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "mine") == want


def test_nobody_else_counts_cores_for_threads():
    """Neither cores / ranks by hand, nor a number for torch that is not use_threads'."""
    files = [*(ROOT / "nanoinfra").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    assert not [path for path in files if "cpu_count() or 1) //" in path.read_text()]


def test_this_machine_has_as_many_as_it_may_use():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
