"""The device mesh: world = pp x dp x cp x tp ranks; tp counts fastest, then cp, dp, pp.

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

from nanoinfra.distributed.check_mesh_size import check_mesh_size
from nanoinfra.distributed.comm_log import CommLog
from nanoinfra.distributed.emulated_link import EmulatedLink

MESH_AXIS_NAMES = ("pp", "dp", "cp", "tp")
_DIMS_OF_AXIS = {name: (name,) for name in MESH_AXIS_NAMES} | {"data": ("dp", "cp"), "world": MESH_AXIS_NAMES}
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
    `timeout`, in s, is how long a collective may take, on every axis: torch's own default, unless given.
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
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        for name in _DIMS_OF_AXIS:
            setattr(self, name, self._new_axis(name, self._rank_lines(name), "axis"))

    def split(self, axis_name: str, inner_size: int) -> tuple[MeshAxis, MeshAxis]:
        """Split an axis, of any name, into (outer, inner); every rank calls it, with the same arguments.

        `inner` is this rank's group of `inner_size` neighbouring ranks, `outer` the ranks that have the same
        place in theirs: of ranks 0 to 5 in groups of 3, rank 4 has inner (3, 4, 5) and outer (1, 4). Both
        keep the axis's name, so that the comm log counts them under it and its emulated link holds. Raises
        ValueError unless `inner_size` divides the axis.
        """
        _check_axis_name(axis_name)
        axis = getattr(self, axis_name)
        if inner_size < 1 or axis.size % inner_size:
            works = max(n for n in range(1, axis.size + 1) if axis.size % n == 0 and n <= max(1, inner_size))
            raise ValueError(f"{axis.size} ranks of the axis {axis_name} do not make groups of {inner_size}; "
                             f"try groups of {works}")
        if inner_size in (1, axis.size):
            alone = self._make_axis(axis_name, (self.rank,), None)
            return (alone, axis) if inner_size == axis.size else (axis, alone)
        lines = self._rank_lines(axis_name)                              # (axes, outer size * inner size)
        inner = lines.reshape(-1, inner_size)
        outer = lines.unflatten(1, (-1, inner_size)).mT.flatten(0, 1)
        return self._new_axis(axis_name, outer, "split"), self._new_axis(axis_name, inner, "split")

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
        dims = [MESH_AXIS_NAMES.index(name) for name in _DIMS_OF_AXIS[axis_name]]
        grid = torch.arange(prod(self._sizes)).view(self._sizes)
        grid = grid.movedim(dims, [*range(-len(dims), 0)])
        return grid.reshape(-1, prod(self._sizes[dim] for dim in dims))

    def _new_axis(self, axis_name, lines, purpose):
        """This rank's row of `lines` (axes, ranks) as an axis with a process group of its own."""
        lines = tuple(map(tuple, lines.tolist()))
        has_group = len(lines[0]) > 1
        group = _process_group(lines, purpose, self._timeout, self._world_group) if has_group else None
        mine = [ranks for ranks in lines if self.rank in ranks]
        return self._make_axis(axis_name, mine[0], group) if mine else None

    def _make_axis(self, axis_name, ranks, group):
        link = EmulatedLink(*self._links[axis_name]) if axis_name in self._links else None
        return MeshAxis(axis_name, ranks.index(self.rank), ranks, group, self.comm_log, link)

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
        _check_axis_name(name)
        if latency < 0 or bandwidth <= 0:
            raise ValueError(f"the wire of {name} has latency {latency} s and bandwidth {bandwidth} bytes/s; "
                             f"it needs latency >= 0 and bandwidth > 0, as in {name}=20e-6,2e9")


def single_rank_axis(name: str) -> MeshAxis:
    """An axis of one rank, for code that has no mesh."""
    return MeshAxis(name, 0, (0,), None, CommLog())


def world_size() -> int:
    """Number of ranks of this run; 1 in a plain process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _check_axis_name(name):
    if name not in _DIMS_OF_AXIS:
        raise ValueError(f"no axis is called {name!r}; there are {', '.join(MESH_AXIS_NAMES)}, data or world")


@functools.cache                             # a gloo group keeps its threads for ever, so each is made once
def _process_group(lines, purpose, timeout, world_group):
    """This rank's group of those of `lines`; `world_group` keys the cache to one process group.

    Axes of the same lines share a group, unless `purpose` differs. A line of all ranks takes the world's own
    group, where that has the timeout.
    """
    limit = timedelta(seconds=timeout) if timeout else None
    spans_world = purpose == "axis" and len(lines[0]) == world_group.size()
    if spans_world and (limit is None or limit == _timeout_of(world_group)):
        return world_group
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in lines], timeout=limit)[0]


def _timeout_of(group):
    """The timeout of a process group: that of its backend for the CPU, or of its only one (NCCL)."""
    return group._get_backend(group._device_types[0]).options._timeout
