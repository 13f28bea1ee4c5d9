import os

import numpy as np
import pytest
import torch

from nanoinfra.distributed import comm, mesh
from nanoinfra.distributed.mesh import AXES, Mesh
from nanoinfra.distributed.pool.ranks import Ranks

SHAPES = [(1, 1, 1, 4), (4, 1, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2), (2, 2, 1, 1)]


def places(shape):
    """{axis: (rank, size, global ranks, which ranks it really sums over, in decimal digits)}."""
    m = Mesh(*shape)
    axes = {name: getattr(m, name) for name in (*AXES, "data", "world")}
    sums = {name: comm.all_reduce(torch.tensor(10 ** m.rank), axis).item() for name, axis in axes.items()}
    return {name: (axis.rank, axis.size, axis.ranks, sums[name]) for name, axis in axes.items()}


def lines(shape):
    """For each rank, the same by numpy: tp counts fastest, then cp, dp, pp."""
    grid = np.arange(np.prod(shape)).reshape(shape)
    for rank, (p, d, c, t) in enumerate(np.ndindex(shape)):
        along = {"pp": grid[:, d, c, t], "dp": grid[p, :, c, t], "cp": grid[p, d, :, t],
                 "tp": grid[p, d, c, :], "data": grid[p, :, :, t].flatten(), "world": grid.flatten()}
        yield {name: place(rank, tuple(ranks.tolist())) for name, ranks in along.items()}


def place(rank, ranks):
    return ranks.index(rank), len(ranks), ranks, sum(10 ** r for r in ranks)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_order(ranks, shape):
    for rank, (got, want) in enumerate(zip(ranks(4).run(places, shape), lines(shape))):
        assert got == want, f"rank {rank} of {shape}"


@pytest.mark.prove
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 2, 1)])
def test_rank_order_of_eight(ranks, shape):
    assert ranks(8).run(places, shape) == list(lines(shape))


def test_three_ranks(ranks):
    assert ranks(3).run(places, (1, 3, 1, 1)) == list(lines((1, 3, 1, 1)))


def test_a_plain_process_is_a_mesh_of_one():
    m = Mesh()
    assert (m.rank, m.world.size, m.data.ranks, m.tp.group) == (0, 1, (0,), None)
    assert repr(m) == "Mesh(pp=1, dp=1, cp=1, tp=1, rank=0)"


def refuse(shape):
    try:
        Mesh(*shape)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("n, shape, want", [
    (1, (1, 2, 1, 1), "pp=1 x dp=2 x cp=1 x tp=1 = 2 does not fit 1 ranks; try --dp 1"),
    (4, (1, 4, 1, 2), "pp=1 x dp=4 x cp=1 x tp=2 = 8 does not fit 4 ranks; try --dp 2"),
    (4, (1, 1, 1, 3), "pp=1 x dp=1 x cp=1 x tp=3 = 3 does not fit 4 ranks; try 3 ranks"),
    (4, (1, 0, 1, 4), "every axis needs at least 1 rank, got pp=1 dp=0 cp=1 tp=4; leave unused axes at 1"),
])
def test_a_mesh_that_does_not_fit(ranks, n, shape, want):
    assert ranks(n).run(refuse, shape) == [want] * n


def threads_of_meshes():
    def threads():
        return len(os.listdir("/proc/self/task"))
    first, before = Mesh(dp=2, tp=2), threads()
    again = [Mesh(dp=2, tp=2) for _ in range(5)]
    same_group = all(m.dp.group is first.dp.group for m in again)
    return threads() - before, same_group, len({id(m.ledger) for m in again})


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads through /proc")
def test_a_shape_makes_its_groups_once_and_each_mesh_its_own_ledger(ranks):
    assert ranks(4).run(threads_of_meshes) == [(0, True, 5)] * 4


def wires():
    m, own, none = Mesh(dp=2), Mesh(dp=2, wire={"tp": (0.0, 1e9)}), Mesh(dp=2, wire={})
    return [axis.link and (axis.link.latency, axis.link.bandwidth)
            for axis in (m.dp, m.data, m.tp, m.world, own.dp, own.tp, none.dp)]


def test_the_pools_wire_is_the_default(ranks):
    with Ranks(2, wire={"dp": (1e-3, 1e6)}) as pool:
        wire = (1e-3, 1e6)
        assert pool.run(wires) == [[wire, wire, None, None, None, (0.0, 1e9), None]] * 2
    assert ranks(2).run(wires) == [[None, None, None, None, None, (0.0, 1e9), None]] * 2


@pytest.mark.parametrize("wire, want", [
    ({"ddp": (0, 1)}, "no axis is called 'ddp'; .* pp, dp, cp, tp, data or world"),
    ({"tp": (-1, 1)}, "latency -1 s"),
    ({"tp": (0, 0)}, "bandwidth 0 bytes/s"),
])
def test_bad_wires(wire, want):
    for refuses in (lambda: Mesh(wire=wire), lambda: mesh.emulate(wire), lambda: Ranks(2, wire=wire)):
        with pytest.raises(ValueError, match=want):
            refuses()


def stretches(pp, dp, tp, size):
    mesh = Mesh(pp=pp, dp=dp, tp=tp)
    inner = mesh.inner("tp", size)
    total = comm.all_reduce(torch.tensor(float(mesh.rank)), inner).item()
    return inner.name, inner.rank, inner.ranks, total, inner is mesh.tp


def test_an_inner_axis_is_a_stretch_of_neighbours(ranks):
    got = ranks(4).run(stretches, 1, 1, 4, 2)
    assert got == [("tp", 0, (0, 1), 1.0, False), ("tp", 1, (0, 1), 1.0, False),
                   ("tp", 0, (2, 3), 5.0, False), ("tp", 1, (2, 3), 5.0, False)]
    assert [each[1:3] for each in ranks(4).run(stretches, 1, 2, 2, 1)] == [(0, (rank,)) for rank in range(4)]
    assert all(each[4] for each in ranks(4).run(stretches, 2, 1, 2, 2))
    assert ranks(4).run(pairs_of_dp) == [((0, 1), 1.0), ((0, 1), 1.0), ((2, 3), 5.0), ((2, 3), 5.0)]


def pairs_of_dp():
    inner = Mesh(dp=4).inner("dp", 2)
    return inner.ranks, comm.all_reduce(torch.tensor(float(Mesh(dp=4).rank)), inner).item()
