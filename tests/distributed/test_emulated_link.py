import time

import pytest
import torch

from nanoinfra.distributed import comm
from nanoinfra.distributed.emulated_link import EmulatedLink
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.collectives import ring_collective_seconds

WIRE = (10e-3, 1e6)                          # 10 ms, 1 MB/s: slow enough to be timed beside other work
SLACK = 1.1


def pair(n):
    """A wired axis and the same without a wire, all ranks having just met."""
    wired, plain = Mesh(dp=n, emulated_links={"dp": WIRE}).dp, Mesh(dp=n).dp
    comm.barrier(plain)
    return wired, plain


def seconds(op, n, x):
    return ring_collective_seconds(op, x.nbytes * (n if op == "all_gather" else 1), n, *WIRE)


def sync(op, late):
    axis, _ = pair(world_size())
    x = torch.ones(axis.size, 24_000 // axis.size)                                     # 96 kB
    time.sleep(late if axis.rank == 0 else 0)
    begin = time.monotonic()
    getattr(comm, op)(x, axis)
    return begin, time.monotonic(), seconds(op, axis.size, x)


@pytest.mark.timed
@pytest.mark.parametrize("op, n", [("all_reduce", 2), ("all_reduce", 3), ("all_gather", 3),
                                   ("all_to_all", 4)])
def test_a_collective_takes_what_the_formula_says(ranks, op, n):
    for begin, end, want in ranks(n).run(sync, op, late=0):
        assert want > 0.1
        assert want <= end - begin <= SLACK * want


@pytest.mark.timed
def test_the_clock_starts_with_the_last_rank_and_stops_for_all_at_once(ranks):
    times = ranks(3).run(sync, "all_reduce", late=0.2)
    last = max(begin for begin, _, _ in times)
    assert last - min(begin for begin, _, _ in times) >= 0.15
    for _, end, want in times:
        assert want <= end - last <= SLACK * want


def two_at_once():
    axis, _ = pair(2)
    x = torch.ones(40_000)
    begin = time.monotonic()
    first, second = (comm.all_reduce(x, axis, async_op=True) for _ in range(2))
    issued = time.monotonic()
    second.wait()                            # in the other order: the first has had its turn all the same
    middle = time.monotonic()
    first.wait()
    return issued - begin, middle - begin, time.monotonic() - middle, 2 * seconds("all_reduce", 2, x)


@pytest.mark.timed
def test_two_collectives_share_the_link_one_after_the_other(ranks):
    for issued, both, rest, want in ranks(2).run(two_at_once):
        assert issued < 0.1
        assert want <= both <= SLACK * want
        assert rest < 0.1


def overlapped(compute):
    axis, _ = pair(2)
    x = torch.ones(60_000)                                                             # 0.26 s
    begin = time.monotonic()
    pending = comm.all_reduce(x, axis, async_op=True)
    time.sleep(compute)
    pending.wait()
    return time.monotonic() - begin, axis.comm_log.records[-1].wait_seconds, seconds("all_reduce", 2, x)


@pytest.mark.timed
def test_compute_hides_communication(ranks):
    for total, exposed, want in ranks(2).run(overlapped, 0.15):
        assert want <= total <= SLACK * want
        assert abs(exposed - (want - 0.15)) <= 0.1 * want
    for total, exposed, want in ranks(2).run(overlapped, 0.4):
        assert 0.4 <= total <= SLACK * 0.4
        assert exposed <= 0.1 * want


def messages():
    axis, _ = pair(3)
    x = torch.ones(48_000)                                                             # 0.2 s
    gave = time.monotonic()
    comm.ring_shift(x, axis)
    took = time.monotonic()
    comm.barrier(Mesh(dp=3).dp)
    begin = time.monotonic()
    if axis.rank > 0:
        comm.recv(x, axis, src=axis.rank - 1)
    if axis.rank < 2:
        comm.send(x, axis, dst=axis.rank + 1)
    return gave, took, begin, time.monotonic(), seconds("send", 3, x)


@pytest.mark.timed
def test_messages_arrive_when_the_formula_says(ranks):
    gave, took, begin, end, (want, *_) = zip(*ranks(3).run(messages))
    for rank in range(3):
        assert want <= took[rank] - gave[rank - 1] <= SLACK * want
    assert want <= end[1] - begin[0] <= SLACK * want
    assert 2 * want <= end[2] - begin[0] <= SLACK * 2 * want                           # two hops


def test_seconds_are_the_formula():
    got = EmulatedLink(1e-3, 1e6).transfer_seconds("all_reduce", 4000, 4)
    assert got == ring_collective_seconds("all_reduce", 4000, 4,
                                          1e-3, 1e6)
