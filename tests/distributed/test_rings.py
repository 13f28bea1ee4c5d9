import time

import pytest
import torch

from nanoinfra.distributed import comm, rings
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.collectives import ring_bytes, ring_seconds

WIRE = (5e-3, 1e6)


def both(op, dtype):
    """By the ring and by comm, on the same numbers: results, rows sent, payload."""
    axis = Mesh(dp=world_size()).dp
    n = axis.size
    shape = (n, 3, 5) if op == "reduce_scatter" else (3 * n, 4)
    x = torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(axis.rank)).to(dtype)
    want = getattr(comm, op)(x.clone(), axis)
    axis.ledger.take()
    got = getattr(rings, f"ring_{op}")(x, axis, "ring")
    payload = got.nbytes if op == "all_gather" else x.nbytes
    return torch.equal(got, want), got is x, payload, [(r.op, r.tag, r.payload) for r in axis.ledger.rows]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("op, hops", [("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)])
def test_rings_equal_comm_and_send_what_the_paper_says(ranks, op, hops, n):
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        for equal, same, payload, rows in ranks(n).run(both, op, dtype):
            assert equal
            assert same or op != "all_reduce"
            assert len(rows) == hops * (n - 1)
            assert all(row == ("exchange", "ring", payload // n) for row in rows)
            assert sum(sent for _, _, sent in rows) == ring_bytes(op, payload, n)


def reduce_transposed():
    axis = Mesh(dp=world_size()).dp
    x = torch.arange(6.0).view(2, 3).t() * (axis.rank + 1)
    return rings.ring_all_reduce(x, axis) is x, x.tolist()


def test_all_reduce_in_place_through_strides(ranks):
    assert ranks(3).run(reduce_transposed) == [(True, [[0, 18], [6, 24], [12, 30]])] * 3


def reduce_seven():
    with pytest.raises(ValueError, match="a ring of 3 cuts 7 elements .* pad them to 9"):
        rings.ring_all_reduce(torch.zeros(7), Mesh(dp=3).dp)


def test_chunks_must_be_equal(ranks):
    ranks(3).run(reduce_seven)


def timed():
    axis = Mesh(dp=world_size(), wire={"dp": WIRE}).dp
    x = torch.ones(120_000)
    comm.barrier(Mesh(dp=world_size()).dp)
    begin = time.monotonic()
    rings.ring_all_reduce(x, axis)
    return begin, time.monotonic()


@pytest.mark.timed
def test_hops_on_an_emulated_wire_take_what_the_formula_says(ranks):
    want = ring_seconds("all_reduce", 480_000, 3, *WIRE)                               # 0.66 s
    times = ranks(3).run(timed)
    for _, end in times:
        assert want <= end - min(begin for begin, _ in times) <= 1.1 * want
