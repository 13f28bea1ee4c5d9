"""What a machine has, where a control group says less, and what a process has had."""
import subprocess
import sys

import psutil
import pytest

from nanoinfra.distributed.host_memory import free_memory, host_memory, limits


def groups(tmp_path, line, files):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (tmp_path / "mine").write_text(f"{line}\n")
    return tmp_path / "cgroup", tmp_path / "mine"


@pytest.mark.parametrize("line, files, want", [
    ("0::/", {"memory.max": 5000}, {5000}),                                # a container of its own
    ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": 7000, "memory.max": 9000}, {7000, 9000}),
    ("0::/seen/from/outside", {"memory.max": 4000}, {4000}),
    ("4:cpu,memory:/a", {"memory/a/memory.limit_in_bytes": 3000}, {3000}),
    ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": 3000}, set()),
    ("0::/", {"memory.max": "max"}, set()),
], ids=["v2", "v2, its parents'", "v2, named from outside", "v1", "another controller", "none"])
def test_a_control_group_may_allow_less(tmp_path, line, files, want):
    where = groups(tmp_path, line, files)
    assert set(limits(*where)) == want
    assert host_memory(*where) == min([psutil.virtual_memory().total, *want])


def test_without_control_groups_it_is_the_machine(tmp_path):
    assert host_memory(tmp_path / "none", tmp_path / "none") == psutil.virtual_memory().total
    assert 0 < free_memory() <= psutil.virtual_memory().total


def test_a_process_answers_for_itself_and_not_for_its_parent():
    """Linux hands `ru_maxrss` on from the parent: a run started by a large program had that one's peak."""
    ballast = b"x" * (300 << 20)
    code = "from nanoinfra.distributed.host_memory import resident_peak; print(resident_peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < len(ballast)
