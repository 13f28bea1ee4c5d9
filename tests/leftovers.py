"""Nothing that a test starts outlives it: what does is killed, and is an error of that test, of no later one.

A child is found by its parent, and one whose parent has ended by the mark in its environment. The pools that
the library keeps for a whole session may stay.
"""
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

import pytest

from nanoinfra.distributed.pool.rank_pool import RankPool, shared_rank_pool
from tests.processes import MARK, alive, command, end, gone, marked, parent, running

ENDING = 2.0                                 # CPU seconds that a process may take to end
LAZY = "nanoinfra.serve.server.openai.chat_template_process"  # the first chat of a server starts it


@pytest.fixture(scope="module", autouse=True)
def nothing_outlives_a_module(request):
    with nothing_stays(request.node.nodeid):
        yield


@pytest.fixture(autouse=True)
def nothing_outlives_a_test(request):
    with nothing_stays(request.node.nodeid, LAZY):
        yield


@contextmanager
def nothing_stays(name: str, but: str | None = None) -> Iterator[None]:
    """All that starts within the `with` ends with it, commands with the words `but` apart.

    AssertionError, after the kill, for what does not.
    """
    outside, mark = os.environ.get(MARK, ""), f"{os.getpid()} {name}"
    os.environ[MARK] = mark
    before = running()
    try:
        yield
    finally:
        os.environ[MARK] = outside

    def left():
        return [pid for pid in _ours(running() - before, mark)
                if alive(pid) and not (but and but in command(pid))]
    if commands := {pid: command(pid) for pid in gone(left(), ENDING)}:
        end(left)
        gc.collect()                         # so that a warning of what was killed is this test's too
        raise AssertionError(f"{name} leaves processes behind: {commands}")


def _ours(pids, mark):
    """Of `pids` those that this test has started, in a pool too, without what the session keeps."""
    server = forkserver._forkserver._forkserver_pid
    helpers = {server, resource_tracker._resource_tracker._pid}
    crews = [pool._processes for pool in _session_pools() if pool._processes]
    kept = helpers | {process.pid for crew in crews for process in crew.processes}
    parents = {os.getpid(), server} - {None}
    return [pid for pid in pids - kept
            if parent(pid) in parents or marked(pid, mark) and parent(pid) not in kept]


def _session_pools():
    """The pools in the caches of two functions of the library, which alone refer to them."""
    check = sys.modules.get("nanoinfra.lab.check")
    caches = [shared_rank_pool, *([check._shared_pool] if check else [])]
    kept = [each for cache in caches for referred in gc.get_referents(cache) if isinstance(referred, dict)
            for each in referred.values()]
    return [pool for pool in kept if isinstance(pool, RankPool)]
