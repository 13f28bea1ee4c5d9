"""Random decoders, small and awkward: any family, odd sizes, grouped queries, H K unlike C, tied or not."""
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.tensor_parallel import check_tp_fits_model
from tests.families import KINDS

VARIANTS = [{}, {}, {"window": 3}, {"window": 5, "full_layers": 1}, {"attention_bias": True},
            {"attention_bias": False, "mlp_bias": True, "activation": "relu"}]     # of every family


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def configs():
    """A strategy of `ModelConfig`; draw from it inside a test."""
    size = st.integers(1, 40)
    few = st.integers(1, 3)
    return st.builds(_config, vocab=st.integers(2, 60), width=size, layers=few, groups=few, kv_heads=few,
                     pairs=st.integers(1, 8), hidden=size, tied=st.booleans(),
                     family=st.sampled_from(KINDS), variant=st.sampled_from(VARIANTS))


@pytest.fixture(scope="session")
def shared_configs(configs):
    """A strategy of (config, t): decoders that t ranks can share, two to six of them."""
    return configs.map(lambda config: (config, _ranks(config))).filter(lambda pair: pair[1]).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), st.sampled_from(pair[1])))


@pytest.fixture(scope="session")
def first_of():
    """`with first_of(t) as mesh`: rank 0 of t, whom no other sends anything; good for counting."""
    return _first_of


@contextmanager
def _first_of(t):
    dist.init_process_group("fake", rank=0, world_size=t, store=FakeStore())
    try:
        yield Mesh(tp=t)
    finally:
        dist.destroy_process_group()


def _ranks(config):
    return [t for t in range(2, 7) if _fits(config, t)]


def _fits(config, t):
    try:
        check_tp_fits_model(config, t)
    except ValueError:
        return False
    return True


def _config(vocab, width, layers, groups, kv_heads, pairs, hidden, tied, family, variant):
    return ModelConfig(vocab, width, layers, groups * kv_heads, kv_heads, 2 * pairs, hidden, 20, tied, family,
                       **variant)
