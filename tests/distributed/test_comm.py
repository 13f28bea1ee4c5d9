import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, world_size

DTYPES = ["float32", "float64", "bfloat16", "int64"]
LAYOUTS = {"dense": lambda x: x.clone(),
           "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
           "strided": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2]}
IN_PLACE = ("all_reduce", "broadcast")
WANT = {                                     # op -> what rank r should get, from all ranks' arrays
    "all_reduce": lambda xs, r: sum(xs),
    "all_gather": lambda xs, r: np.stack(xs),
    "reduce_scatter": lambda xs, r: sum(xs)[r],
    "all_to_all": lambda xs, r: np.stack([x[r] for x in xs]),
    "broadcast": lambda xs, r: xs[0],
    "exchange": lambda xs, r: xs[r - 1],
}


def values(rank, n):
    """(N, 3, 2), small integers: their sums are exact in every dtype."""
    return np.random.default_rng(rank).integers(-8, 9, (n, 3, 2))


def call(op, dtype, layout, wait):
    axis = Mesh(dp=world_size()).dp
    x = LAYOUTS[layout](torch.from_numpy(values(axis.rank, axis.size)).to(getattr(torch, dtype)))
    y = getattr(comm, op)(x, axis, "t", wait=wait)
    if not wait:
        first, y = y, y.wait()
        assert first.wait() is y
    assert y is x or op not in IN_PLACE
    assert y.dtype == x.dtype
    return y.to(torch.float64).numpy()


def call_all(op):
    return {(dtype, layout, wait): call(op, dtype, layout, wait)
            for dtype in DTYPES for layout in LAYOUTS for wait in (True, False)}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("op", WANT)
def test_values(ranks, op, n):
    xs = [values(r, n) for r in range(n)]
    for rank, got in enumerate(ranks(n).run(call_all, op)):
        want = WANT[op](xs, rank)
        assert len(got) == 24
        for case, y in got.items():
            np.testing.assert_array_equal(y, want, err_msg=f"{op} on rank {rank} of {n}, {case}")


def extremes():
    axis = Mesh(dp=world_size()).dp
    low, high = torch.tensor([axis.rank, -axis.rank]), torch.tensor([axis.rank, -axis.rank])
    return comm.all_reduce(low, axis, op="min").tolist(), comm.all_reduce(high, axis, op="max").tolist()


def test_min_and_max(ranks):
    assert ranks(3).run(extremes) == [([0, -2], [2, 0])] * 3


def broadcast_from(source):
    mesh = Mesh(dp=2, tp=2)
    return comm.broadcast(torch.tensor([mesh.rank]), mesh.dp, source=source).item()


def test_broadcast_source_is_a_place_on_the_axis(ranks):
    assert ranks(4).run(broadcast_from, 1) == [2, 3, 2, 3]


def relay(layout):
    """Rank 0 -> 1 -> 2, each adding one; the last posts its receive before anything is sent."""
    axis = Mesh(pp=world_size()).pp
    x = LAYOUTS[layout](torch.zeros(2, 3, 2))
    if axis.rank > 0:
        pending = comm.recv(x, axis, source=axis.rank - 1, wait=False)
        assert pending.wait() is x
    x += 1
    if axis.rank < axis.size - 1:
        assert comm.send(x, axis, to=axis.rank + 1) is x
    return x.tolist(), [(row.op, row.seq, row.payload, row.ranks) for row in axis.ledger.rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_send_and_recv(ranks, layout):
    got = ranks(3).run(relay, layout)
    assert [x for x, _ in got] == [torch.full((2, 3, 2), r + 1.0).tolist() for r in range(3)]
    assert got[0][1] == [("send", 1, 48, (0, 1))]
    assert got[1][1] == [("recv", 1, 48, (0, 1)), ("send", 1, 48, (1, 2))]
    assert got[2][1] == [("recv", 1, 48, (1, 2))]


def objects():
    axis = Mesh(dp=world_size()).dp
    return comm.gather_objects({"rank": axis.rank, "text": "é" * axis.rank, "none": None}, axis)


@pytest.mark.parametrize("n", [1, 3])
def test_gather_objects(ranks, n):
    want = [{"rank": r, "text": "é" * r, "none": None} for r in range(n)]
    assert ranks(n).run(objects) == [want] * n


def meet():
    axis = Mesh(dp=world_size()).dp
    time.sleep(0.1 * axis.rank)
    came = time.monotonic()
    comm.barrier(axis)
    return came, time.monotonic()


def test_no_rank_leaves_a_barrier_before_the_last_has_come(ranks):
    times = ranks(3).run(meet)
    assert min(left for _, left in times) >= max(came for came, _ in times)


def round_trips(shape, dtype):
    """gather(scatter(x)) and its relatives, on this rank's own random numbers."""
    mesh = Mesh(dp=world_size())
    axis, n = mesh.dp, world_size()
    same = torch.Generator().manual_seed(7)
    x = torch.randint(-8, 9, (n, *shape), generator=same).to(getattr(torch, dtype))
    mine = x.roll(axis.rank, 0)
    summed = comm.all_reduce(mine.clone(), axis)
    return {
        "gather(my row) == x": torch.equal(comm.all_gather(x[axis.rank], axis), x),
        "gather(reduce_scatter(x)) == all_reduce(x)":
            torch.equal(comm.all_gather(comm.reduce_scatter(mine, axis), axis), summed),
        "all_to_all twice is nothing": torch.equal(comm.all_to_all(comm.all_to_all(mine, axis), axis), mine),
        "n exchanges go once round": torch.equal(_around(mine, axis), mine),
    }


def _around(x, axis):
    for _ in range(axis.size):
        x = comm.exchange(x, axis)
    return x


@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 4), shape=st.lists(st.integers(0, 5), max_size=3), dtype=st.sampled_from(DTYPES))
def test_properties(ranks, n, shape, dtype):
    for holds in ranks(n).run(round_trips, shape, dtype):
        assert all(holds.values()), holds


def test_one_process_needs_no_ranks():
    axis = Mesh().tp
    x = torch.arange(6.0).view(1, 6)
    assert axis.group is None
    assert comm.all_reduce(x, axis) is x
    assert torch.equal(comm.all_gather(x, axis), x[None])
    assert torch.equal(comm.reduce_scatter(x, axis, wait=False).wait(), x[0])
    assert torch.equal(comm.exchange(x, axis, wait=False).wait(), x)
    comm.barrier(axis)
    assert comm.gather_objects([1], axis) == [[1]]
    assert axis.ledger.rows == []
