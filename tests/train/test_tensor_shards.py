import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.train.checkpoint import tensor_shards
from nanoinfra.train.checkpoint.tensor_shards import (
    CheckpointError,
    check_shards_cover_tensor,
    fill_from_stored_shards,
)


@st.composite
def nested(draw, shape, cuts=3):
    """A piece made by up to `cuts` cuts of a tensor of `shape`, and the cuts."""
    piece, made = TensorShard.of_whole_tensor("w", shape), []
    for _ in range(draw(st.integers(0, cuts)) if shape else 0):
        dim = draw(st.integers(0, len(shape) - 1))
        start, stop = sorted(draw(st.tuples(*[st.integers(0, piece.size[dim])] * 2)))
        piece = piece.slice_dim(dim, start, stop)
        made.append((dim, start, stop))
    return piece, made


shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)


@given(st.data())
def test_a_cut_of_a_cut_is_a_plain_box(data):
    shape = data.draw(shapes)
    piece, cuts = data.draw(nested(shape))
    whole = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.int64).reshape(shape)
    want = whole
    for dim, start, stop in cuts:
        want = want.narrow(dim, start, stop - start)
    got = whole[piece.slices_within()]
    assert torch.equal(got, want) and tuple(got.shape) == piece.size


@given(st.data())
def test_overlap_is_the_common_elements_and_indexes_both_sides(data):
    shape = data.draw(shapes)
    (a, _), (b, _) = data.draw(nested(shape)), data.draw(nested(shape))
    whole = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    want = sorted(set(whole[a.slices_within()].flatten().tolist())
                  & set(whole[b.slices_within()].flatten().tolist()))
    common = a.intersect(b)
    assert common == b.intersect(a)
    if common is None:
        assert want == []
    else:
        for held in (a, b):
            assert whole[held.slices_within()][common.slices_within(held)].flatten().tolist() == want != []


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_cover_accepts_a_partition_and_nothing_less_or_more(rows, columns, data):
    total, start, parts = sum(rows), 0, []
    for n in rows:
        parts.append(TensorShard.of_whole_tensor("w", (total, columns)).slice_dim(0, start, start + n))
        start += n
    check_shards_cover_tensor(parts, "w", (total, columns))
    full = [p for p in parts if p.size[0]]
    if full:
        one = data.draw(st.sampled_from(full))
        with pytest.raises(CheckpointError, match="overlap"):
            check_shards_cover_tensor([*parts, one], "w", (total, columns))
        with pytest.raises(CheckpointError, match=f"of its {total * columns} elements"):
            check_shards_cover_tensor([p for p in parts if p != one], "w", (total, columns))


def test_an_overlap_and_a_gap_of_equal_size_do_not_cancel():
    whole = TensorShard.of_whole_tensor("w", (6,))
    with pytest.raises(CheckpointError, match=r"w\[0:3\] and w\[2:5\] overlap"):
        check_shards_cover_tensor([whole.slice_dim(0, 0, 3), whole.slice_dim(0, 2, 5)], "w", (6,))


def test_a_scalar_is_held_exactly_once():
    scalar = TensorShard.of_whole_tensor("t", ())
    check_shards_cover_tensor([scalar], "t", ())
    for wrong in ([], [scalar, scalar]):
        with pytest.raises(CheckpointError):
            check_shards_cover_tensor(wrong, "t", ())


def test_keys_say_the_range():
    whole = TensorShard.of_whole_tensor("blocks.0.attn.q.weight", (8, 6))
    assert whole.file_key == "blocks.0.attn.q.weight"
    part = whole.slice_dim(1, 3, 6).slice_dim(0, 2, 5)
    assert part.file_key == "blocks.0.attn.q.weight[2:5, 3:6]" and part.ranges == ((2, 5), (3, 6))


@pytest.mark.parametrize("make", [
    lambda: TensorShard("w", (0,), (3, 3), (3, 3)),
    lambda: TensorShard("w", (2, 0), (2, 3), (3, 3)),
    lambda: TensorShard("w", (-1, 0), (2, 3), (3, 3)),
    lambda: TensorShard.of_whole_tensor("w", (4, 4)).slice_dim(0, 2, 4).slice_dim(0, 0, 3),
])
def test_a_box_outside_its_tensor_is_refused(make):
    with pytest.raises(ValueError, match="w"):
        make()


def test_columns_are_filled_from_rows_and_no_other_file_is_opened():
    """Saved by 3 ranks in rows, wanted by columns 1..3 of rows 0..4: the last rank's rows are not opened."""
    whole, opened = torch.arange(24).view(6, 4), []
    rows = [TensorShard.of_whole_tensor("w", (6, 4)).slice_dim(0, k, k + 2) for k in (0, 2, 4)]

    def opener(shard):
        return lambda: opened.append(shard) or whole[shard.slices_within()]
    wanted = TensorShard.of_whole_tensor("w", (6, 4)).slice_dim(1, 1, 3).slice_dim(0, 0, 4)
    out = torch.empty(wanted.size, dtype=whole.dtype)
    fill_from_stored_shards(out, wanted, [(shard, opener(shard)) for shard in rows])
    assert torch.equal(out, whole[:4, 1:3]) and opened == rows[:2]


def test_the_arithmetic_needs_no_torch():
    tree = ast.parse(Path(tensor_shards.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"collections.abc", "itertools", "math", "nanoinfra.formulas.parameters"}
