"""The device mesh: world = pp x dp x cp x tp ranks on torch's DeviceMesh, tp fastest, then cp, dp, pp.

An axis is a direction of the mesh (a dim is a tensor's). `data` is dp x cp flattened: the ranks that hold the
same weights and see different tokens. An axis of size 1 has no process group and needs none, so `Mesh()`
works in a plain process. The mesh is passed as an argument everywhere; nanoinfra has no global process-group
state.
"""
import functools
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanoinfra.distributed.check_mesh_size import check_mesh_size
from nanoinfra.distributed.comm_log import CommLog
from nanoinfra.distributed.emulated_link import EmulatedLink

MESH_AXIS_NAMES = ("pp", "dp", "cp", "tp")
_default_links: dict[str, tuple[float, float]] = {}    # see set_default_emulated_links


@dataclass(frozen=True)
class MeshAxis:
    """The ranks that differ from this rank along one direction of the mesh only, and their process group."""
    name: str
    rank: int                                # of this rank on the axis, from 0
    global_ranks: tuple[int, ...]            # of the axis, in its order
    group: object                            # torch process group; None when size is 1
    comm_log: CommLog = field(repr=False)
    emulated_link: EmulatedLink | None = None

    @property
    def size(self) -> int:
        """Number of ranks on the axis."""
        return len(self.global_ranks)


class Mesh:
    """The axes pp, dp, cp, tp, data and world, as in `mesh.dp.rank` and `mesh.tp.size`, with one CommLog.

    `emulated_links={"tp": (latency_s, bytes_per_s)}` emulates a slow link on an axis (see emulated_link.py);
    `data` uses dp's. Where none is given, those of `set_default_emulated_links` hold, which a RankPool sets.
    `timeout`, in s, is how long a collective may take: torch's own default, unless given.
    Raises ValueError where pp x dp x cp x tp is not the number of ranks.
    """

    def __init__(self, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1,
                 emulated_links: dict[str, tuple[float, float]] | None = None, device: str = "cpu",
                 timeout: float | None = None):
        sizes = (pp, dp, cp, tp)
        check_mesh_size(world_size(), pp, dp, cp, tp)
        self.comm_log, self.device = CommLog(), device
        self._sizes, self._timeout = sizes, timeout
        links = _default_links if emulated_links is None else emulated_links
        check_emulated_links(links)
        self._links = {"data": links["dp"], **links} if "dp" in links else links
        self._world_group = dist.group.WORLD if dist.is_initialized() else None
        groups = _groups(device, sizes, self._world_group)
        for name in (*MESH_AXIS_NAMES, "data", "world"):
            setattr(self, name, self._make_axis(name, *groups[name]))
        self.rank = self.world.rank

    def subgroup_of_size(self, axis_name: str, size: int) -> MeshAxis:
        """This rank's group of `size` neighbouring ranks on an axis, as an axis. Every rank calls it."""
        axis = getattr(self, axis_name)
        if size == axis.size:
            return axis
        return self._new_axis(axis_name, self._rank_lines(axis_name).reshape(-1, size), "subgroup")

    def duplicate_axis(self, axis_name: str) -> MeshAxis:
        """The same ranks with a second process group: messages on one do not wait for those on the other."""
        return self._new_axis(axis_name, self._rank_lines(axis_name), "duplicate")

    def first_last_subgroup(self, axis_name: str) -> MeshAxis | None:
        """First and last rank of an axis as an axis; None on the ranks between. Every rank calls it."""
        lines = self._rank_lines(axis_name)
        ends = lines[:, [0, -1]] if lines.shape[1] > 1 else lines
        return self._new_axis(axis_name, ends, "first and last")

    def _rank_lines(self, axis_name):
        """The global ranks of every axis of that name: (axes, ranks)."""
        grid = torch.arange(prod(self._sizes)).view(self._sizes)
        grid = grid.movedim(MESH_AXIS_NAMES.index(axis_name), -1)
        return grid.reshape(-1, grid.shape[-1])

    def _new_axis(self, axis_name, lines, purpose):
        """This rank's row of `lines` (axes, ranks) as an axis with a process group of its own."""
        lines = tuple(map(tuple, lines.tolist()))
        has_group = len(lines[0]) > 1
        group = _subgroup(lines, purpose, self._timeout, self._world_group) if has_group else None
        mine = [ranks for ranks in lines if self.rank in ranks]
        return self._make_axis(axis_name, mine[0], group) if mine else None

    def _make_axis(self, axis_name, ranks, group):
        me = dist.get_rank() if dist.is_initialized() else 0
        link = EmulatedLink(*self._links[axis_name]) if axis_name in self._links else None
        return MeshAxis(axis_name, ranks.index(me), ranks, group, self.comm_log, link)

    def __repr__(self):
        sizes = ", ".join(f"{name}={getattr(self, name).size}" for name in MESH_AXIS_NAMES)
        return f"Mesh({sizes}, rank={self.rank})"


def set_default_emulated_links(links: dict[str, tuple[float, float]] | None) -> None:
    """From now on each Mesh of this process that is given no links emulates these; None ends that."""
    check_emulated_links(links or {})
    _default_links.clear()
    _default_links.update(links or {})


def check_emulated_links(links: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError unless `links` maps axis names to (latency in s, bandwidth in bytes/s)."""
    for name, (latency, bandwidth) in links.items():
        if name not in (*MESH_AXIS_NAMES, "data", "world"):
            raise ValueError(f"no axis is called {name!r}; a wire goes on {', '.join(MESH_AXIS_NAMES)}, data "
                             "or world")
        if latency < 0 or bandwidth <= 0:
            raise ValueError(f"the wire of {name} has latency {latency} s and bandwidth {bandwidth} bytes/s; "
                             f"it needs latency >= 0 and bandwidth > 0, as in {name}=20e-6,2e9")


def single_rank_axis(name: str) -> MeshAxis:
    """An axis of one rank, for code that has no mesh."""
    return MeshAxis(name, 0, (0,), None, CommLog())


def world_size() -> int:
    """Number of ranks of this run; 1 in a plain process."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache                             # a gloo group keeps its threads for ever, so each is made once
def _groups(device, sizes, world_group):
    """{axis name: (global ranks, group)} of this rank; `world_group` keys the cache to one process group."""
    if prod(sizes) == 1:
        return dict.fromkeys((*MESH_AXIS_NAMES, "data", "world"), ((0,), None))
    mesh = init_device_mesh(device, sizes, mesh_dim_names=MESH_AXIS_NAMES)
    axes = {name: _line(mesh[name]) for name in MESH_AXIS_NAMES}
    pp, dp, cp, tp = sizes
    axes["world"] = (tuple(range(prod(sizes))), world_group)
    flat = dp > 1 and cp > 1
    axes["data"] = _line(mesh["dp", "cp"]._flatten("data")) if flat else axes["dp" if cp == 1 else "cp"]
    return axes


@functools.cache
def _subgroup(lines, purpose, timeout, world_group):
    limit = timedelta(seconds=timeout) if timeout else None
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in lines], timeout=limit)[0]


def _line(mesh):
    ranks = tuple(mesh.mesh.flatten().tolist())
    return ranks, mesh.get_group() if len(ranks) > 1 else None
