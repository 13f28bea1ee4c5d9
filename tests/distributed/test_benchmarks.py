from collections import Counter

import pytest
import torch

from nanoinfra.distributed.measure_links_and_matmul import (
    measure_matmul_flops_per_second,
    time_collective_by_payload,
)
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.collectives import fit_latency_bandwidth

WIRE = (4e-3, 1e8)                           # slow enough to be timed beside other work
QUICK = ("nanoinfra.distributed.measure_links_and_matmul", "_MAX_CALL_SECONDS", 0.1)


def fitted(axis, op):
    mesh = Mesh(**{axis: world_size()}, emulated_links={axis: WIRE})
    times = time_collective_by_payload(mesh, getattr(mesh, axis), op, rounds=5)
    middle = {size: sorted(seconds)[2] for size, seconds in times.items()}
    return fit_latency_bandwidth(op, world_size() if op == "all_reduce" else 2, middle)


@pytest.mark.timed
@pytest.mark.parametrize("axis, op, n", [("dp", "all_reduce", 2), ("tp", "all_reduce", 3), ("pp", "send", 2)])
def test_an_emulated_wire_is_found(ranks, axis, op, n):
    for got in ranks(n).run(fitted, axis, op, mutants=(QUICK,)):
        assert (got.latency, got.bandwidth) == pytest.approx(WIRE, rel=0.1)


def probed(axis, op):
    mesh = Mesh(**{axis: world_size()})
    times = time_collective_by_payload(mesh, getattr(mesh, axis), op, rounds=3)
    rows = mesh.comm_log.take_records()
    assert {row.tag for row in rows} == {"probe"}
    return times, Counter((row.op, row.axis_name, row.payload_bytes) for row in rows
                          if row.axis_name != "world")


SIZES = ("nanoinfra.distributed.measure_links_and_matmul", "_PAYLOAD_SIZES_BYTES", (4096, 16384))
FOUR = ("nanoinfra.distributed.measure_links_and_matmul", "_MIN_SAMPLE_SECONDS",
        0.0)            # one call a sample


def test_the_slowest_ranks_times_of_all_reduces(ranks):
    (want, sent), *others = ranks(3).run(probed, "dp", "all_reduce", mutants=(SIZES, FOUR))
    assert list(want) == [4096, 16384] and all(len(seconds) == 3 for seconds in want.values())
    assert all(got == (want, sent) for got in others)
    assert sent == {("all_reduce", "dp", size): 2 + 2 + 3 for size in want}


def test_messages_go_there_and_back_and_an_odd_rank_waits(ranks):
    (want, sent), second, third = ranks(3).run(probed, "pp", "send", mutants=(SIZES, FOUR))
    assert sent == {(op, "pp", size): 2 + 2 + 3 for size in want for op in ("send", "recv")}
    assert second == (want, sent) and third == (want, Counter())


def test_a_payload_that_would_take_too_long_is_not_tried(ranks):
    never = ("nanoinfra.distributed.measure_links_and_matmul", "_MAX_CALL_SECONDS", 0.0)
    sizes = ("nanoinfra.distributed.measure_links_and_matmul", "_PAYLOAD_SIZES_BYTES", (4096, 16384, 65536))
    assert [list(times) for times, _ in ranks(2).run(probed, "dp", "all_reduce", mutants=(never, sizes))] \
        == [[4096, 16384], [4096, 16384]]


def test_the_matmul_rate_counts_two_flops_a_multiply_add(monkeypatch):
    """A clock that advances a second a reading: one product of n = 512 takes one."""
    ticks = iter(range(1000))
    monkeypatch.setattr("nanoinfra.distributed.measure_links_and_matmul.time.perf_counter",
                        lambda: float(next(ticks)))
    assert measure_matmul_flops_per_second(Mesh(), torch.float32, rounds=3) == [2 * 512 ** 3] * 3
