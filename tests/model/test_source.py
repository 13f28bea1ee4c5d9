from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.model.source import Source, bounds, joined, made_shape, read_box

K = 4
SOURCES = {"plain": Source("w"), "turned": Source("w", transposed=True), "thirds": Source("w", third=0),
           "turned thirds": Source("w", transposed=True, third=0),
           "by head": Source("w", third=0, by_head=True), "skipped": Source("w", skip=2)}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), heads=st.integers(1, 4), columns=st.integers(0, 5))
def test_any_box_is_that_part_of_the_whole_and_reads_no_more(source, data, heads, columns):
    shape = (heads * K, columns) if columns or source.transposed else (heads * K,)
    ours = [torch.randn(shape) for _ in range(1 if source.third is None else 3)]
    stored, fetched = joined(source, K, ours), []

    def fetch(name, box):
        fetched.append(stored[box].numel())
        return stored[box]

    for third, want in enumerate(ours):
        mine = source._replace(third=third) if source.third is not None else source
        assert made_shape(mine, stored.shape) == shape
        pairs = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
        box = tuple(slice(*pair) for pair in pairs)
        fetched.clear()
        assert torch.equal(read_box(mine, shape, K, box, fetch), want[box])
        assert sum(fetched) == prod(want[box].shape)
        assert torch.equal(read_box(mine, shape, K, bounds("w", shape, ()), fetch), want)


def test_blooms_rows_go_by_turns_and_opts_positions_begin_with_two_of_zeros():
    q, k, v = (torch.arange(4.0) + 10 * i for i in range(3))     # two heads of 2
    got = joined(Source("w", third=0, by_head=True), 2, [q, k, v])
    assert got.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    got = joined(Source("w", skip=2), 2, [torch.ones(3, 1)])
    assert got.flatten().tolist() == [0, 0, 1, 1, 1]


def test_a_fused_tensor_that_is_no_three_fits_no_shape():
    assert made_shape(Source("w", third=1), (10, 4)) not in {(3, 4), (4, 4)}


@pytest.mark.parametrize("box", [(slice(0, 5), slice(None)), (slice(0, 2),), (slice(0, 4, 2), slice(None)),
                                 (slice(3, 1), slice(None)), (slice(-2, None), slice(None))])
def test_what_is_no_part_is_refused(box):
    with pytest.raises(ValueError, match=r"w has no part .*: its shape is \(4, 3\); give slices"):
        bounds("w", (4, 3), box)
