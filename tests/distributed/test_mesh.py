import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanoinfra.distributed import comm, mesh
from nanoinfra.distributed.mesh import MESH_AXIS_NAMES, Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool

SHAPES = [(1, 1, 1, 4), (4, 1, 1, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 2, 2), (2, 2, 1, 1)]


def places(shape):
    """{axis: (rank, size, global ranks, which ranks it really sums over, in decimal digits)}."""
    m = Mesh(*shape)
    axes = {name: getattr(m, name) for name in (*MESH_AXIS_NAMES, "data", "world")}
    sums = {name: comm.all_reduce(torch.tensor(10 ** m.rank), axis).item() for name, axis in axes.items()}
    return {name: (axis.rank, axis.size, axis.global_ranks, sums[name]) for name, axis in axes.items()}


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
    assert (m.rank, m.world.size, m.data.global_ranks, m.tp.group) == (0, 1, (0,), None)
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
    return threads() - before, same_group, len({id(m.comm_log) for m in again})


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads through /proc")
def test_a_shape_makes_its_groups_once_and_each_mesh_its_own_ledger(ranks):
    assert ranks(4).run(threads_of_meshes) == [(0, True, 5)] * 4


def wires():
    m, own, none = Mesh(dp=2), Mesh(dp=2, emulated_links={"tp": (0.0, 1e9)}), Mesh(dp=2, emulated_links={})
    return [axis.emulated_link and (axis.emulated_link.latency, axis.emulated_link.bandwidth)
            for axis in (m.dp, m.data, m.tp, m.world, own.dp, own.tp, none.dp)]


def test_the_pools_wire_is_the_default(ranks):
    with RankPool(2, emulated_links={"dp": (1e-3, 1e6)}) as pool:
        wire = (1e-3, 1e6)
        assert pool.run(wires) == [[wire, wire, None, None, None, (0.0, 1e9), None]] * 2
    assert ranks(2).run(wires) == [[None, None, None, None, None, (0.0, 1e9), None]] * 2


@pytest.mark.parametrize("wire, want", [
    ({"ddp": (0, 1)}, "no axis is called 'ddp'; .* pp, dp, cp, tp, data or world"),
    ({"tp": (-1, 1)}, "latency -1 s"),
    ({"tp": (0, 0)}, "bandwidth 0 bytes/s"),
])
def test_bad_wires(wire, want):
    for refuses in (lambda: Mesh(emulated_links=wire), lambda: mesh.set_default_emulated_links(wire),
                    lambda: RankPool(2, emulated_links=wire)):
        with pytest.raises(ValueError, match=want):
            refuses()


SPLITS = [((1, 1, 1, 4), "tp", 2), ((4, 1, 1, 1), "pp", 2), ((1, 4, 1, 1), "dp", 2), ((1, 1, 4, 1), "cp", 2),
          ((1, 2, 2, 1), "data", 2), ((1, 1, 4, 1), "data", 2), ((2, 2, 1, 1), "world", 2),
          ((1, 2, 1, 2), "dp", 2), ((2, 1, 1, 2), "tp", 1)]


def split(shape, name, inner_size):
    """(outer, inner) as `places` describes an axis, and which of them is the axis itself."""
    mesh = Mesh(*shape)
    parts = mesh.split(name, inner_size)
    sums = [comm.all_reduce(torch.tensor(10 ** mesh.rank), part).item() for part in parts]
    assert {part.name for part in parts} == {name}
    return [(part.rank, part.size, part.global_ranks, total, part is getattr(mesh, name))
            for part, total in zip(parts, sums)]


def split_of(shape, name, inner_size):
    """For each rank, the same by numpy from the axis itself: neighbours within, equal places across."""
    for rank, axes in enumerate(lines(shape)):
        ranks = axes[name][2]
        groups = np.array(ranks).reshape(-1, inner_size)
        [(group, at)] = np.argwhere(groups == rank)
        yield [(*place(rank, tuple(mine.tolist())), len(mine) == len(ranks) > 1)
               for mine in (groups[:, at], groups[group])]


@pytest.mark.parametrize("shape, name, inner_size", SPLITS)
def test_a_split_has_neighbours_within_and_equal_places_across(ranks, shape, name, inner_size):
    for rank, (got, want) in enumerate(zip(ranks(4).run(split, shape, name, inner_size),
                                           split_of(shape, name, inner_size), strict=True)):
        assert got == want, f"rank {rank} of {shape}"


@pytest.mark.prove
@pytest.mark.parametrize("shape, name, inner_size", [
    ((1, 4, 2, 1), "data", 4), ((2, 2, 1, 2), "world", 4), ((1, 1, 4, 2), "cp", 2),
    ((1, 2, 2, 2), "data", 2)])
def test_a_split_of_eight(ranks, shape, name, inner_size):
    assert ranks(8).run(split, shape, name, inner_size) == list(split_of(shape, name, inner_size))


def test_a_split_of_a_plain_process_is_two_axes_of_one():
    outer, inner = Mesh().split("data", 1)
    assert (outer.size, inner.size, outer.group, inner.group) == (1, 1, None, None)


def refuse_split(name, inner_size):
    try:
        Mesh(dp=4).split(name, inner_size)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name, inner_size, want", [
    ("dp", 3, "4 ranks of the axis dp do not make groups of 3; try groups of 2"),
    ("data", 8, "4 ranks of the axis data do not make groups of 8; try groups of 4"),
    ("tp", 2, "1 ranks of the axis tp do not make groups of 2; try groups of 1"),
    ("dp", 0, "4 ranks of the axis dp do not make groups of 0; try groups of 1"),
    ("ep", 2, "no axis is called 'ep'; there are pp, dp, cp, tp, data or world"),
])
def test_a_split_that_does_not_divide_is_refused(ranks, name, inner_size, want):
    assert ranks(4).run(refuse_split, name, inner_size) == [want] * 4


def traffic_of_split():
    mesh = Mesh(dp=4, emulated_links={"dp": (0.01, 1e6)})
    outer, inner = mesh.split("data", 2)
    before = len(os.listdir("/proc/self/task"))
    same = [a.group is b.group for a, b in zip((outer, inner), Mesh(dp=4).split("data", 2))]
    new_threads = len(os.listdir("/proc/self/task")) - before
    for axis in (outer, inner):
        comm.all_reduce(torch.zeros(1000), axis, "experts")
    rows = mesh.comm_log.take_records()
    assert all(row.end_time - row.start_time > 0.024 for row in rows)      # two steps of 0.01 s, 4,000 bytes
    sent = [(row.axis_name, row.axis_size, row.payload_bytes, row.global_ranks) for row in rows]
    return same, new_threads, sent


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads through /proc")
def test_a_split_makes_its_groups_once_and_is_counted_and_slowed_as_its_axis(ranks):
    for rank, (same, new_threads, rows) in enumerate(ranks(4).run(traffic_of_split)):
        assert same == [True, True] and new_threads == 0
        outer, inner = ((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]
        assert rows == [("data", 2, 4000, outer), ("data", 2, 4000, inner)]


def timeouts(shape, timeout):
    """{axis: the timeout of its process group in s}, of all axes and of what is made of them."""
    mesh = Mesh(*shape, timeout=timeout)
    axes = {name: getattr(mesh, name) for name in (*MESH_AXIS_NAMES, "data", "world")}
    axes |= {f"{name} twice": mesh.duplicate_axis(name) for name in MESH_AXIS_NAMES}
    axes |= {f"{name}'s ends": mesh.first_last_subgroup(name) for name in MESH_AXIS_NAMES}
    for name in (*MESH_AXIS_NAMES, "data", "world"):
        if axes[name].size % 2 == 0:
            axes[f"outer {name}"], axes[f"inner {name}"] = mesh.split(name, 2)
    return {name: axis.group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for name, axis in axes.items() if axis and axis.group}


@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (1, 4, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1)])
def test_every_group_has_the_timeout_asked_for(ranks, shape):
    for got in ranks(4).run(timeouts, shape, 61.0):
        assert set(got.values()) == {61.0}, got
        assert len(got) >= 6
    assert set(ranks(4).run(timeouts, shape, None)[0].values()) == {1800.0}            # torch's own


def shared_groups(timeout):
    mesh = Mesh(dp=4, timeout=timeout)
    is_worlds = [axis.group is dist.group.WORLD for axis in (mesh.dp, mesh.data, mesh.world)]
    return is_worlds, mesh.dp.group is mesh.data.group


def test_a_line_of_all_ranks_takes_the_worlds_group_if_that_has_the_timeout(ranks):
    for timeout, has in ((None, True), (1800.0, True), (61.0, False)):
        assert ranks(4).run(shared_groups, timeout) == [([has] * 3, True)] * 4
