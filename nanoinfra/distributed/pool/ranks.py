"""A pool of rank processes for notebooks, tests and labs: `Ranks(4).run(fn, ...)` gives one result a rank.

The processes fork from a server that has imported torch already and live until `close`, so a call costs
milliseconds. A rank that fails, dies or hangs ends the pool; RanksError says where each rank stood, and the
next call starts a fresh pool. Inside `fn`, `Mesh(dp=4)` of nanoinfra.distributed.mesh just works.
"""
import functools
import os
import sys
from collections.abc import Callable

import cloudpickle

from nanoinfra.distributed.mesh import check_wire
from nanoinfra.distributed.pool.rank_main import Call
from nanoinfra.distributed.pool.rank_processes import Crew, RanksError

__all__ = ["Ranks", "RanksError", "shared"]


class Ranks:
    """`n` ranks on this machine's CPUs. A context manager; else they end by `close`, or with the program.

    `wire={"tp": (20e-6, 2e9)}` (seconds, bytes/s) emulates a wire on those axes of every Mesh made inside.
    `timeout`: seconds a call may take. `threads`: torch threads a rank. ValueError for a bad `n` or wire.
    """

    def __init__(self, n: int, wire: dict[str, tuple[float, float]] | None = None, timeout: float = 60.0,
                 threads: int = 1):
        if n < 1:
            raise ValueError(f"a pool needs at least 1 rank, got {n}; try Ranks(2)")
        check_wire(wire or {})
        self.n, self.wire, self.timeout, self.threads = n, wire, timeout, threads
        self._crew = Crew(n)

    def run(self, fn: Callable, *args, mutants: tuple = (), **kw) -> list:
        """[fn(*args, **kw) of rank 0, of rank 1, ...]; what the ranks print appears with their number.

        `fn` travels by value if it comes from a notebook, a test, or any module that is not installed. Each
        call starts from one state: seeds 0, float32, gradients on, no global hooks, warnings are errors, the
        caller's folder. `mutants` are in force during `fn`: ("package.module", "attribute", replacement), or
        functions that return a context manager.
        Raises RanksError where a rank fails, dies, or has not answered after `timeout` seconds.
        """
        call = Call(fn, args, kw, tuple(mutants), self.wire, self.threads, os.getcwd())
        text = _pickled(call)
        if not (self._crew and self._crew.alive()):
            self.close()
            self._crew = Crew(self.n)
        try:
            return self._crew.run(text, self.timeout)
        except BaseException:                          # KeyboardInterrupt too: no rank goes on alone
            self.close()
            raise

    def close(self) -> None:
        """End the ranks. A later `run` starts new ones."""
        crew, self._crew = getattr(self, "_crew", None), None
        if crew:
            crew.end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    __del__ = close


@functools.cache
def shared(n: int) -> Ranks:
    """The one pool of `n` ranks that all callers in this process share."""
    return Ranks(n)


def _pickled(call):
    """`call` as bytes; modules that its functions and objects come from go by value, unless installed."""
    mutants = [part for m in call.mutants for part in (m if isinstance(m, tuple) else [m])]
    inner = getattr(call.fn, "func", None)             # of a functools.partial
    parts = [call.fn, inner, *call.args, *call.kw.values(), *mutants]
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
