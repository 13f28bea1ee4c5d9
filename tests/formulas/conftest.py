"""Random decoders, small and awkward: any family, odd sizes, grouped queries, H K unlike C, tied or not."""
import pytest
import torch
from hypothesis import strategies as st

from nanoinfra.formulas.shape import FAMILIES, ModelConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def configs():
    """A strategy of `ModelConfig`; draw from it inside a test."""
    size = st.integers(1, 40)
    few = st.integers(1, 3)
    return st.builds(_config, vocab=st.integers(2, 60), width=size, layers=few, groups=few, kv_heads=few,
                     pairs=st.integers(2, 8), hidden=size, tied=st.booleans(),
                     family=st.sampled_from(sorted(FAMILIES)))


def _config(vocab, width, layers, groups, kv_heads, pairs, hidden, tied, family):
    return ModelConfig(vocab, width, layers, groups * kv_heads, kv_heads, 2 * pairs, hidden, 20, tied, family)
