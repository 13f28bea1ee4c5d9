"""What all tests share: pools of ranks, started once a session; one torch thread; what watches the tests."""
import os
import signal

import hypothesis
import pytest
import torch

from nanoinfra.distributed.pool.ranks import shared
from tests import cpu_seconds, leftovers, timed

hypothesis.settings.register_profile("patient", deadline=None,     # a slow machine is no fault
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}       # of the programs that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs, and theirs, ignore it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)               # and what nohup starts this one


def pytest_configure(config):
    for plugin in (cpu_seconds, leftovers, timed):
        config.pluginmanager.register(plugin)


def pytest_addoption(parser):
    cpu_seconds.add_option(parser)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n).run(fn, ...)`: the session's pool of `n` ranks."""
    pools = {}

    def pool(n):
        pools[n] = shared(n)
        pools[n].timeout = 500.0             # the report of who waits comes before pytest's own limit
        return pools[n]
    yield pool
    for each in pools.values():
        each.close()
