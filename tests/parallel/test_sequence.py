"""The stream cut along T: what leaves comes back, padding is nobody's, another length is noticed."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nanoinfra.distributed.mesh import Mesh, alone
from nanoinfra.parallel.sequence_parallel import Cut, CutPositions


def round_trip(shapes):
    """Of each (B, T, C): is what was cut and gathered the sum over the ranks; how large was my share?"""
    axis, found = Mesh(tp=torch.distributed.get_world_size()).tp, []
    for B, T, C in shapes:
        region, whole = Cut(axis, keep=False), torch.arange(B * T * C, dtype=torch.float64).view(B, T, C)
        mine = region.leave(whole * (axis.rank + 1))
        again, kept = region.enter(mine, "layers")
        assert kept is mine and torch.equal(region.again(kept, "layers").wait(), again)
        total = axis.size * (axis.size + 1) / 2
        found.append((torch.equal(again, whole * total), tuple(mine.shape)))
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_what_leaves_comes_back_summed(ranks, n):
    shapes = [(B, T, 3) for B in (1, 2) for T in (1, 2, 3, 7, 8)]
    for got in ranks(n).run(round_trip, shapes):
        assert got == [(True, (B, -(-T // n), C)) for B, T, C in shapes]


@settings(max_examples=50, deadline=None)
@given(T=st.integers(1, 30), n=st.integers(1, 8))
def test_positions_of_all_ranks_are_all_positions(T, n):
    places, parts = torch.arange(1, T + 1), []
    for rank in range(n):
        axis = type("Axis", (), {"size": n, "rank": rank})
        parts.append(Cut(axis, keep=True).mine(places))
    assert {len(part) for part in parts} == {-(-T // n)}
    together = torch.cat(parts)
    assert torch.equal(together[:T], places) and not together[T:].any()


def test_positions_are_looked_up_for_my_tokens_alone():
    axis = type("Axis", (), {"size": 2, "rank": 1})
    table = nn.Embedding(9, 4)
    got = CutPositions(table, Cut(axis, keep=True))(torch.arange(5).repeat(2, 1))        # (B, T)
    assert torch.equal(got, table.weight[torch.tensor([[3, 4, 0]] * 2)])


def test_a_backward_after_another_length_is_no_silent_nonsense():
    region = Cut(alone("tp"), keep=False)
    mine = region.leave(torch.ones(1, 5, 2))
    region.leave(torch.ones(1, 3, 2))
    with pytest.raises(RuntimeError, match="5 tokens come back where 3 left"):
        region.enter(mine, "layers")
