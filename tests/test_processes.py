"""The tests' own helpers: what is started ends, what is left is named and killed, waiting is by progress."""
import ast
import os
import signal
import subprocess
import sys
import time
from itertools import count
from types import SimpleNamespace

import pytest

from nanoinfra.distributed.pool.ranks import Ranks
from tests import cpu_seconds, processes, timed
from tests.leftovers import nothing_stays
from tests.processes import MARK, alive, children, gone, marked, started, until

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds processes through /proc")
TREE = ["bash", "-c", "setsid sleep 1000 & sleep 1000 & wait"]
ORPHAN = ["bash", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"]
SPIN = [sys.executable, "-c", "while True: pass"]


@needs_proc
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_started_ends_with_all_below_it(fails):
    with pytest.raises(KeyError if fails else SystemExit), started(TREE) as process:
        until(lambda: len(children(process.pid)) == 2)
        pids = [process.pid, *children(process.pid)]
        raise KeyError if fails else SystemExit
    assert len(pids) == 3 and not any(map(alive, pids)) and process.returncode == -9


@needs_proc
@pytest.mark.parametrize("start", [
    lambda: subprocess.Popen(["sleep", "1000"]), lambda: subprocess.Popen(SPIN), lambda: Ranks(2),
    lambda: subprocess.run(ORPHAN, stdout=subprocess.PIPE, check=True)],
    ids=["child", "busy child", "pool", "orphan"])
def test_what_outlives_a_test_is_its_error_and_killed(start, monkeypatch):
    monkeypatch.setattr(processes, "ENDS", 0.5)
    kept = []
    with pytest.raises(AssertionError, match="leaves processes") as caught, nothing_stays("this one"):
        kept.append(start())
    left = ast.literal_eval(str(caught.value).partition("behind: ")[2])
    assert left and not any(map(alive, left))
    for each in kept:
        each.close() if isinstance(each, Ranks) else getattr(each, "wait", int)()


@needs_proc
def test_a_process_is_found_while_it_starts_a_program(monkeypatch):
    monkeypatch.setenv(MARK, "just started")
    for _ in range(100):
        pid = int(subprocess.run(ORPHAN, stdout=subprocess.PIPE, check=True).stdout)
        found = marked(pid, "just started")
        os.kill(pid, signal.SIGKILL)
        assert found


@needs_proc
def test_the_sessions_pools_and_what_ends_in_time_are_none(ranks):
    with nothing_stays("this one"):
        ranks(2).run(os.getpid)
        subprocess.Popen(["sleep", "0.3"]).wait()
        assert os.environ[MARK] == f"{os.getpid()} this one"


@needs_proc
def test_waiting_goes_on_while_something_works_and_ends_when_nothing_does(monkeypatch):
    with started(SPIN) as process:
        assert gone([process.pid], work=0.1) == [process.pid]
    with monkeypatch.context() as patch:
        patch.setattr(processes, "PATIENCE", 0.1)
        begin, spent = time.monotonic(), count(1)
        patch.setattr(processes, "below", lambda: next(spent))
        until(lambda: time.monotonic() > begin + 0.5)
        patch.setattr(processes, "below", lambda: 7.0)
        with pytest.raises(AssertionError, match="nothing happens"):
            until(lambda: False)
    with started(["sleep", "0"], stderr=subprocess.PIPE) as process, pytest.raises(AssertionError):
        until(lambda: False, process)


def test_a_timed_test_is_measured_again_and_no_other_is(monkeypatch):
    monkeypatch.setattr(timed, "PAUSE", 0.0)

    def tries(fails, mark):
        seen = []

        def test():
            seen.append(1)
            assert len(seen) > fails
        item = SimpleNamespace(get_closest_marker=lambda name: mark, funcargs={}, obj=test,
                               _fixtureinfo=SimpleNamespace(argnames=()))
        return timed.pytest_pyfunc_call(item), len(seen)
    assert tries(timed.TRIES - 1, True) == (True, timed.TRIES)
    assert tries(0, None) == (None, 0)
    monkeypatch.setattr(timed, "crowded", lambda: 1.0)
    with pytest.raises(AssertionError):
        tries(timed.TRIES, True)
    monkeypatch.setattr(timed, "crowded", lambda: 3.2)
    with pytest.raises(pytest.skip.Exception, match="a CPU second takes 3.2 s: needs an idle core"):
        tries(timed.TRIES, True)


@needs_proc
def test_cpu_seconds_count_what_a_test_starts_and_do_not_shrink():
    meter = cpu_seconds.Meter()
    before = meter.note()
    with started(SPIN) as process:
        until(lambda: meter.note() > before + 0.5, process)
    assert meter.note() >= before + 0.5 and meter.since() > 0.5 > meter.since()


def test_a_folder_that_takes_more_than_it_may_is_named():
    folders = cpu_seconds.by_folder({"tests/a/test_x.py::f": 2.0, "tests/a/test_y.py::g[1::2]": 3.0,
                                     "tests/test_z.py::h": 1.0})
    assert folders == {"a": 5.0, "tests": 1.0}
    assert cpu_seconds.exceeded(folders, {"a": 4, "tests": 1}, slow=1.25) == []
    (line,) = cpu_seconds.exceeded(folders, {"a": 4, "tests": 1}, slow=1.0)
    assert line.startswith("tests/a took 5 CPU seconds, allowed are 4")
