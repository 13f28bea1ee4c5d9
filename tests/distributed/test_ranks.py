import dataclasses
import functools

import pytest
import torch

from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.distributed.pool.ranks import Ranks, shared

OFFSET = 10


@dataclasses.dataclass
class Point:
    x: int


def helper(x):
    return x + OFFSET


def use_helper(x, *, scale=1):
    return helper(x) * scale + Mesh(dp=world_size()).rank


def test_one_result_a_rank_in_order(ranks):
    assert ranks(3).run(use_helper, 5) == [15, 16, 17]
    assert ranks(3).run(use_helper, 5, scale=2) == [30, 31, 32]


def test_functions_travel_by_value(ranks, monkeypatch):
    monkeypatch.setitem(globals(), "OFFSET", 20)       # as when a notebook cell runs again
    step = 3
    assert ranks(2).run(use_helper, 0) == [20, 21]
    assert ranks(2).run(lambda: helper(step)) == [23, 23]
    assert ranks(2).run(functools.partial(use_helper, 1)) == [21, 22]


def move(point):
    return Point(point.x + world_size()), isinstance(point, Point)


def test_classes_and_tensors_there_and_back(ranks):
    assert ranks(2).run(move, Point(1)) == [(Point(3), True)] * 2
    x = torch.arange(6.0).view(2, 3)
    for got in ranks(2).run(lambda x: {"y": x.t(), "w": torch.nn.Linear(3, 1)(x)}, x):
        assert torch.equal(got["y"], x.t())
        assert got["w"].shape == (2, 1)


def test_shared_is_one_pool_a_size():
    assert shared(1) is shared(1)
    assert shared(1).n == 1


def test_a_pool_needs_a_rank():
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        Ranks(0)


def test_threads():
    with Ranks(1, threads=2) as pool:
        assert pool.run(torch.get_num_threads) == [2]
