from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.config import ModelConfig
from nanoinfra.model.weights.hugging_face.parameter_names import HF_PARAMETER_NAMES
from nanoinfra.model.weights.map_parameters_to_stored_tensors import (
    TensorSource,
    join_to_stored_tensor,
    parameter_sources,
    read_parameter_slices,
    resolve_slices,
    shape_from_stored,
)

K = 4
SOURCES = {"plain": TensorSource("w"), "turned": TensorSource("w", transposed=True),
           "fused": TensorSource("w", fused_linears="qkv"),
           "turned and fused": TensorSource("w", transposed=True, fused_linears="qkv"),
           "by head": TensorSource("w", interleave_index=0), "rows before": TensorSource("w", rows_before=2)}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), heads=st.integers(1, 4), columns=st.integers(0, 5))
def test_any_box_is_that_part_of_the_whole_and_reads_no_more(source, data, heads, columns):
    columns = (columns,) if columns or source.transposed else ()
    kv_heads = data.draw(st.integers(1, 4)) if source.fused_linears else heads   # Phi-3's parts are unequal
    each = [heads, kv_heads,
            kv_heads] if source.fused_linears or source.interleave_index is not None else [heads]
    ours = [torch.randn(n * K, *columns) for n in each]
    stored, fetched = join_to_stored_tensor(source, K, ours), []

    def fetch(name, box):
        fetched.append(stored[box].numel())
        return stored[box]

    for turn, want in enumerate(ours):
        shape, rows = tuple(want.shape), [n * K for n in each]
        mine = source._replace(interleave_index=turn) if source.interleave_index is not None else source
        if source.fused_linears:
            mine = source._replace(rows_before=sum(rows[:turn]), rows_after=sum(rows[turn + 1:]))
        assert shape_from_stored(mine, stored.shape) == shape
        pairs = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
        box = tuple(slice(*pair) for pair in pairs)
        fetched.clear()
        assert torch.equal(read_parameter_slices(mine, shape, K, box, fetch), want[box])
        assert sum(fetched) == prod(want[box].shape)
        assert torch.equal(read_parameter_slices(mine, shape, K, resolve_slices("w", shape, ()), fetch), want)


def test_blooms_rows_go_by_turns_and_opts_positions_begin_with_two_of_zeros():
    q, k, v = (torch.arange(4.0) + 10 * i for i in range(3))     # two heads of 2
    got = join_to_stored_tensor(TensorSource("w", interleave_index=0), 2, [q, k, v])
    assert got.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    got = join_to_stored_tensor(TensorSource("w", rows_before=2), 2, [torch.ones(3, 1)])
    assert got.flatten().tolist() == [0, 0, 1, 1, 1]


def test_a_fused_tensor_that_is_no_three_fits_no_shape():
    assert shape_from_stored(TensorSource("w", interleave_index=1), (10, 4)) not in {(3, 4), (4, 4)}


def test_rows_beside_ours_are_counted_from_the_configuration():
    """8 heads that share 2 KV heads of 4, side by side: 32, 8 and 8 rows."""
    config = ModelConfig(vocab=9, width=6, layers=2, heads=8, kv_heads=2, head_dim=4, hidden=10, context=9,
                         family="phi3")
    found = parameter_sources(config, HF_PARAMETER_NAMES["phi3"].tensor_sources)
    for x, want in {"attn.q": (0, 16), "attn.k": (32, 8), "attn.v": (40, 0), "mlp.gate": (0, 10),
                    "mlp.up": (10, 0)}.items():
        source = found[f"blocks.1.{x}.weight"]
        assert (source.rows_before, source.rows_after) == want and source.stored_name.startswith("layers.1.")
    assert shape_from_stored(found["blocks.0.attn.k.weight"], (48, 6)) == (8, 6)
    assert shape_from_stored(found["blocks.0.attn.k.weight"], (47, 6)) != (8, 6)


@pytest.mark.parametrize("box", [(slice(0, 5), slice(None)), (slice(0, 2),), (slice(0, 4, 2), slice(None)),
                                 (slice(3, 1), slice(None)), (slice(-2, None), slice(None))])
def test_what_is_no_part_is_refused(box):
    with pytest.raises(ValueError, match=r"w has no part .*: its shape is \(4, 3\); give slices"):
        resolve_slices("w", (4, 3), box)
