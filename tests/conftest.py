"""What all tests share: pools of rank processes, started once a session; one torch thread."""
import os

import pytest
import torch

from nanoinfra.dist.ranks import shared

torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}       # of the programs that tests start


@pytest.fixture(scope="session")
def ranks():
    """`ranks(n).run(fn, ...)`: the session's pool of `n` ranks."""
    pools = {}

    def pool(n):
        pools[n] = shared(n)
        return pools[n]
    yield pool
    for each in pools.values():
        each.close()
