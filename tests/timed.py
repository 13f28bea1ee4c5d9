"""Tests that measure seconds: `make test` runs them alone, and again where other programs were in the way.

What else runs can only add to a time or spread it, so a bar that is met in one of a few tries is met; a fault
of the code is there in each of them. The bar itself is never wider for it. Where no try meets it and this
process does not get a core when it asks for one, nothing can be said: the test is skipped, and says why.
"""
import time

import pytest

from nanoinfra.distributed.pool.ranks import RanksError

TRIES = 4
PAUSE = 1.0                                  # seconds between two, so that a burst may pass
QUIET = 1.25                                 # seconds a CPU second takes at most, where a core is free


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Call a test marked `timed` until it holds, `TRIES` times at most; leave all others to pytest."""
    if pyfuncitem.get_closest_marker("timed") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    for left in reversed(range(TRIES)):
        try:
            pyfuncitem.obj(**arguments)
            return True
        except (AssertionError, RanksError):           # the latter: a pool's patience was too short
            if not left and (share := crowded()) > QUIET:
                pytest.skip(f"measures seconds, and a CPU second takes {share:.1f} s: needs an idle core")
            if not left:
                raise
            time.sleep(PAUSE)


def crowded(work: float = 0.3) -> float:
    """How long a second of work takes now: 1 where a core is free, more where others share it."""
    begin, spent = time.monotonic(), time.process_time()
    while time.process_time() < spent + work:
        pass
    return (time.monotonic() - begin) / work
