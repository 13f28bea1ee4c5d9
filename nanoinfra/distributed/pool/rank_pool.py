"""A pool of rank processes for notebooks, tests and labs: `RankPool(4).run(fn, ...)` returns 4 results.

The processes fork from a server that has already imported torch, and they live until `close`, so a call
costs milliseconds. When a rank fails, dies or hangs, RankFailedError says where each rank stood, and the next
call starts new processes. Inside `fn`, `Mesh(dp=4)` of nanoinfra.distributed.mesh works without more setup.
"""
import functools
import os
import sys
from collections.abc import Callable

import cloudpickle

from nanoinfra.distributed.mesh import check_emulated_links
from nanoinfra.distributed.pool.rank_main import RankCall
from nanoinfra.distributed.pool.rank_processes import RankFailedError, RankProcesses

__all__ = ["RankFailedError", "RankPool", "shared_rank_pool"]


class RankPool:
    """Rank processes on this machine's CPUs. A context manager; otherwise they end by `close`, or at exit.

    `emulated_links={"tp": (20e-6, 2e9)}` (seconds, bytes/s) emulates slow links on those axes of every Mesh
    that is made in the ranks. `timeout`: seconds a call may take. `threads_per_rank`: torch threads. Raises
    ValueError for `num_ranks` below 1 or a bad link.
    """

    def __init__(self, num_ranks: int, emulated_links: dict[str, tuple[float, float]] | None = None,
                 timeout: float = 60.0, threads_per_rank: int = 1):
        if num_ranks < 1:
            raise ValueError(f"a pool needs at least 1 rank, got {num_ranks}; try RankPool(2)")
        check_emulated_links(emulated_links or {})
        self.num_ranks, self.emulated_links = num_ranks, emulated_links
        self.timeout, self.threads_per_rank = timeout, threads_per_rank
        self._processes = RankProcesses(num_ranks)

    def run(self, fn: Callable, *args, mutants: tuple = (), **kwargs) -> list:
        """Call `fn(*args, **kwargs)` on every rank and return the results, rank 0's first.

        What the ranks print appears here with their number. `fn` is pickled by value if it comes from a
        notebook, a test, or any module that is not installed. Each call starts from the same state: seeds 0,
        float32, gradients on, no global hooks, warnings are errors, the caller's folder. `mutants` are in
        force during `fn`: ("package.module", "attribute", replacement), or functions that return a context
        manager. Raises RankFailedError where a rank fails, dies, or has not answered after `timeout` seconds.
        """
        call = RankCall(fn, args, kwargs, tuple(mutants), self.emulated_links, self.threads_per_rank,
                        os.getcwd())
        pickled_call = _pickle_call(call)
        if not (self._processes and self._processes.all_alive()):
            self.close()
            self._processes = RankProcesses(self.num_ranks)
        try:
            return self._processes.run_pickled_call(pickled_call, self.timeout)
        except BaseException:                          # KeyboardInterrupt too: no rank keeps running alone
            self.close()
            raise

    def close(self) -> None:
        """End the rank processes. A later `run` starts new ones."""
        processes, self._processes = getattr(self, "_processes", None), None
        if processes:
            processes.kill_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    __del__ = close


@functools.cache
def shared_rank_pool(num_ranks: int) -> RankPool:
    """The one pool of that many ranks that all callers in this process share."""
    return RankPool(num_ranks)


def _pickle_call(call):
    """`call` as bytes. Functions and objects of modules that are not installed are pickled by value."""
    mutants = [part for m in call.mutants for part in (m if isinstance(m, tuple) else [m])]
    inner = getattr(call.fn, "func", None)             # of a functools.partial
    parts = [call.fn, inner, *call.args, *call.kwargs.values(), *mutants]
    homes = {sys.modules.get(getattr(part, "__module__", None)) for part in parts}
    known = cloudpickle.list_registry_pickle_by_value()
    shipped = [m for m in homes if m and m.__name__ not in known and not _importable(m)]
    for module in shipped:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(call)
    finally:
        for module in shipped:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(module):
    ours = ("__main__", "lessons", __name__.partition(".")[0], *sys.stdlib_module_names)
    return module.__name__.partition(".")[0] in ours or "site-packages" in (module.__file__ or "")
