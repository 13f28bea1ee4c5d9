import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.distributed.pool import rank_processes
from nanoinfra.distributed.pool.rank_pool import RankFailedError, RankPool
from tests.processes import gone, until

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes through /proc")


@pytest.fixture
def pool():
    """Three ranks that may fail: `pool.pids()` names the processes of now."""
    with RankPool(3, timeout=300) as pool:
        pool.pids = lambda: pool.run(os.getpid)
        yield pool


def at_collective(third, act):
    """All ranks do two all-reduces on tp; before the next, rank `third` does something else."""
    axis = Mesh(tp=world_size()).tp
    for _ in range(2):
        comm.all_reduce(torch.ones(1), axis, "warm")
    if axis.rank == third:
        act()
    comm.all_reduce(torch.ones(1), axis, "grads")


def report_of(pool, act, third=1):
    with pytest.raises(RankFailedError) as caught:
        pool.run(at_collective, third, act)
    return str(caught.value)


WAITS = "rank {} waits in all_reduce #3 (tp, grads) that rank 1 never entered"


def fall():
    raise KeyError("lost")


@pytest.mark.timed
def test_a_rank_that_raises(pool):
    begin = time.monotonic()
    text = report_of(pool, fall)
    assert time.monotonic() - begin < 5
    assert text.startswith("rank 1 of 3 failed\nTraceback")
    assert "KeyError: 'lost'\nwhere each rank stood:\n" in text
    assert WAITS.format(0) in text and WAITS.format(2) in text
    assert "rank 1 last left all_reduce #2 (tp, warm); it has failed" in text


@pytest.mark.timed
@needs_proc
def test_a_rank_that_is_killed(pool):
    pool.pids()
    begin = time.monotonic()
    text = report_of(pool, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert time.monotonic() - begin < 3
    assert text.startswith("rank 1 of 3 was killed by SIGKILL\nwhere each rank stood:\n")
    assert WAITS.format(0) in text and WAITS.format(2) in text


def test_a_rank_that_leaves(pool):
    assert report_of(pool, lambda: os._exit(7)).startswith("rank 1 of 3 exited with code 7\n")
    assert "SystemExit: 2" in report_of(pool, lambda: sys.exit(2))


@pytest.mark.timed
@needs_proc
def test_a_rank_that_is_stopped(pool):
    pids = pool.pids()
    pool.timeout = 1.0
    text = report_of(pool, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    assert text.startswith("3 of 3 ranks gave no answer within 1 s\n")
    assert "rank 1 last left all_reduce #2 (tp, warm); it is stopped" in text
    assert WAITS.format(2) in text
    assert gone(pids) == []


def stay_away():
    axis = Mesh(tp=world_size()).tp
    return None if axis.rank == 1 else comm.all_reduce(torch.ones(1), axis)


@pytest.mark.timed
def test_a_rank_that_never_enters(pool):
    pool.run(at_collective, 3, None)         # an earlier call's collectives are not taken for this one's
    pool.timeout = 0.5
    with pytest.raises(RankFailedError) as caught:
        pool.run(stay_away)
    assert str(caught.value).splitlines() == [
        "2 of 3 ranks gave no answer within 0.5 s", "where each rank stood:",
        "rank 0 waits in all_reduce #1 (tp) that rank 1 never entered",
        "rank 1 has entered no collective; it has returned",
        "rank 2 waits in all_reduce #1 (tp) that rank 1 never entered"]


def receive_nothing():
    axis = Mesh(pp=world_size()).pp
    if axis.rank == 2:
        comm.recv(torch.ones(1), axis, src=1)


@pytest.mark.timed
def test_a_message_that_never_comes(pool):
    pool.timeout = 0.5
    with pytest.raises(RankFailedError,
                       match=re.escape("rank 2 waits in recv #1 (pp) that rank 1 never sent")):
        pool.run(receive_nothing)


@needs_proc
def test_after_a_failure_the_old_ranks_are_gone_and_new_ones_work(pool):
    old = pool.pids()
    report_of(pool, fall)
    assert gone(old) == []
    new = pool.pids()
    assert not set(old) & set(new)
    assert pool.pids() == new                # and stay


@needs_proc
def test_a_rank_killed_between_calls_is_replaced(pool):
    old = pool.pids()
    os.kill(old[0], signal.SIGKILL)
    until(lambda: not Path(f"/proc/{old[0]}").exists())                        # until its last thread ends
    assert len(set(pool.pids()) - set(old)) == 3


@pytest.mark.timed
@needs_proc
def test_an_interrupt_ends_the_ranks(pool):
    pids = pool.pids()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pool.run(time.sleep, 30)
    timer.join()
    assert gone(pids) == []
    assert pool.run(world_size) == [3] * 3


def sockets():
    files = Path("/proc/self/fd").iterdir()
    return sum(file.is_symlink() and "socket" in os.readlink(file) for file in files)


@needs_proc
def test_close_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sockets()
    with RankPool(2) as pool:
        pids = pool.run(os.getpid)
        assert list(tmp_path.glob("tmp*")) == []
    assert gone(pids) == []
    pool.close()
    assert sockets() <= before


@needs_proc
def test_the_server_that_forks_has_no_threads_of_torch(pool):
    """numpy's OpenBLAS has one a core, and knows how to fork; OpenMP and gloo would not."""
    pool.pids()
    tasks = list(Path(f"/proc/{forkserver._forkserver._forkserver_pid}/task").iterdir())
    assert len(tasks) <= os.cpu_count()


SCRIPT = textwrap.dedent("""
    import os, sys
    from nanoinfra.distributed.pool.rank_pool import RankPool

    def me():
        return os.getpid()

    pool = RankPool(2)                # no `if __name__ == "__main__"`: ranks do not run this file again
    print(*pool.run(me), flush=True)
    assert pool.run(lambda: __import__("nanoinfra").__file__) == [sys.argv[2]] * 2
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
""")


def run_script(folder, how):
    """(exit code, processes left, files left) of a script that makes a pool and does not close it."""
    (folder / "script.py").write_text(SCRIPT)
    copy = shutil.copytree(Path(comm.__file__).parents[1], folder / "nanoinfra")       # not the installed one
    command = [sys.executable, folder / "script.py", how, copy / "__init__.py"]
    with tempfile.TemporaryDirectory() as temp:        # not in `folder`: a socket's path has 107 characters
        got = subprocess.run(command, env={**os.environ, "TMPDIR": temp}, text=True, capture_output=True)
        pids = [int(pid) for pid in got.stdout.split()]
        assert (len(pids), got.stderr) == (2, "")
        files = [path.name for path in Path(temp).iterdir()]
        return got.returncode, gone(pids), [f for f in files if not f.startswith("torchinductor_")]


@needs_proc
def test_a_script_that_just_ends_leaves_nothing(tmp_path):
    assert run_script(tmp_path, "ends") == (0, [], [])


def test_a_pool_that_is_left_open_is_closed_once_as_python_ends(monkeypatch):
    """atexit closes it; when the pool itself is collected, modules may be gone already."""
    processes = rank_processes.RankProcesses(1)
    processes.kill_all()
    monkeypatch.setattr(rank_processes, "atexit", None)
    processes.kill_all()
    assert not processes.processes and not processes.pipes


@needs_proc
@pytest.mark.prove
def test_a_script_that_is_killed_leaves_no_process(tmp_path):
    assert run_script(tmp_path, "killed")[:2] == (-9, [])


@needs_proc
def test_ranks_end_when_their_pipe_closes(pool):
    pids = pool.pids()
    for pipe in pool._processes.pipes:
        pipe.close()
    assert gone(pids) == []
