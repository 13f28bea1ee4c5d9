"""Who am I on each axis: world = pp x dp x cp x tp ranks on torch's DeviceMesh, tp fastest, then cp, dp, pp.

An axis is a direction of the mesh (a dim is a tensor's). `data` is dp x cp flattened: the ranks that hold
the same weights and see different tokens. An axis of size 1 has no group and needs none, so `Mesh()` works
in a plain process. The mesh is an argument everywhere; nothing in nanoinfra asks for it behind your back.
"""
import functools
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanoinfra.distributed.emulated_link import Link
from nanoinfra.distributed.ledger import Ledger
from nanoinfra.distributed.mesh_check import check_fits

AXES = ("pp", "dp", "cp", "tp")
_wire: dict[str, tuple[float, float]] = {}   # what Mesh() emulates unless told otherwise; see emulate()


@dataclass(frozen=True)
class Axis:
    """This rank's line of neighbours along one direction of the mesh."""
    name: str
    rank: int                                # place on the axis
    ranks: tuple[int, ...]                   # global ranks, in axis order
    group: object                            # torch process group; None when size is 1
    ledger: Ledger = field(repr=False)
    link: Link | None = None                 # an emulated wire

    @property
    def size(self) -> int:
        """How many ranks stand on the axis."""
        return len(self.ranks)


class Mesh:
    """`mesh.dp.rank`, `mesh.tp.size`, `mesh.data`, `mesh.world`: five axes and the world, one ledger.

    `wire={"tp": (latency_s, bytes_per_s)}` emulates a wire on an axis (see link.py); `data` takes dp's. Where
    none is given, that of `emulate` holds, which a pool of ranks sets.
    `timeout`, in s, is how long a collective may take: torch's own, unless given.
    Raises ValueError where pp x dp x cp x tp is not the number of ranks.
    """

    def __init__(self, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1,
                 wire: dict[str, tuple[float, float]] | None = None, device: str = "cpu",
                 timeout: float | None = None):
        sizes = (pp, dp, cp, tp)
        check_fits(world_size(), pp, dp, cp, tp)
        self.ledger, self.device, self._timeout = Ledger(), device, timeout
        wire = _wire if wire is None else wire
        check_wire(wire)
        self._wire = {"data": wire["dp"], **wire} if "dp" in wire else wire
        self._sizes, self._world = sizes, dist.group.WORLD if dist.is_initialized() else None
        groups = _groups(device, sizes, self._world)
        for name in (*AXES, "data", "world"):
            setattr(self, name, self._axis(name, *groups[name]))
        self.rank = self.world.rank

    def inner(self, name: str, size: int) -> Axis:
        """Of every `size` neighbours on axis `name` an axis of their own: mine. Every rank calls it."""
        axis = getattr(self, name)
        if size == axis.size:
            return axis
        return self._own(name, self._lines(name).reshape(-1, size), "inner")

    def twin(self, name: str) -> Axis:
        """Axis `name` once more, with a group of its own: no message here waits for one there."""
        return self._own(name, self._lines(name), "twin")

    def ends(self, name: str) -> Axis | None:
        """First and last rank of axis `name` as an axis; None for those between. Every rank calls it."""
        lines = self._lines(name)
        return self._own(name, lines[:, [0, -1]] if lines.shape[1] > 1 else lines, "ends")

    def _lines(self, name):
        """All lines of neighbours along axis `name`: (lines, ranks)."""
        grid = torch.arange(prod(self._sizes)).view(self._sizes).movedim(AXES.index(name), -1)
        return grid.reshape(-1, grid.shape[-1])

    def _own(self, name, lines, purpose):
        """This rank's row of `lines` (lines, ranks) as an axis with a group of its own."""
        lines = tuple(map(tuple, lines.tolist()))
        group = _subgroup(lines, purpose, self._timeout, self._world) if len(lines[0]) > 1 else None
        mine = [ranks for ranks in lines if self.rank in ranks]
        return self._axis(name, mine[0], group) if mine else None

    def _axis(self, name, ranks, group):
        me = dist.get_rank() if dist.is_initialized() else 0
        link = Link(*self._wire[name]) if name in self._wire else None
        return Axis(name, ranks.index(me), ranks, group, self.ledger, link)

    def __repr__(self):
        return "Mesh(" + ", ".join(f"{a}={getattr(self, a).size}" for a in AXES) + f", rank={self.rank})"


def emulate(wire: dict[str, tuple[float, float]] | None) -> None:
    """From now on each Mesh made in this process without a wire of its own emulates this; None ends that."""
    check_wire(wire or {})
    _wire.clear()
    _wire.update(wire or {})


def check_wire(wire: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError unless `wire` maps axes to (latency in s, bandwidth in bytes/s)."""
    for name, (latency, bandwidth) in wire.items():
        if name not in (*AXES, "data", "world"):
            raise ValueError(f"no axis is called {name!r}; a wire goes on {', '.join(AXES)}, data or world")
        if latency < 0 or bandwidth <= 0:
            raise ValueError(f"the wire of {name} has latency {latency} s and bandwidth {bandwidth} bytes/s; "
                             f"it needs latency >= 0 and bandwidth > 0, as in {name}=20e-6,2e9")


def alone(name: str) -> Axis:
    """An axis of one rank, for who has no mesh."""
    return Axis(name, 0, (0,), None, Ledger())


def world_size() -> int:
    """Ranks in this run; 1 in a plain process."""
    return dist.get_world_size() if dist.is_initialized() else 1


@functools.cache                             # a gloo group keeps threads for ever: make them once a shape
def _groups(device, sizes, world_group):
    """{axis: (global ranks, group)} of this rank; `world_group` ties the cache to a process group's life."""
    if prod(sizes) == 1:
        return dict.fromkeys((*AXES, "data", "world"), ((0,), None))
    mesh = init_device_mesh(device, sizes, mesh_dim_names=AXES)
    axes = {name: _line(mesh[name]) for name in AXES}
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
