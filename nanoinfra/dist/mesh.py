"""Who am I on each axis: world = pp x dp x cp x tp ranks on torch's DeviceMesh, tp counted fastest, then cp, dp, pp.

An axis is a direction of the mesh (a dim is a tensor's). `data` is dp x cp flattened: the ranks that hold the same
weights and see different tokens. An axis of size 1 has no group and needs none, so `Mesh()` works in a plain
process. The mesh is an argument everywhere; nothing in nanoinfra asks for it behind your back.
"""
import functools
from dataclasses import dataclass, field
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nanoinfra.dist.ledger import Ledger
from nanoinfra.dist.link import Link

AXES = ("pp", "dp", "cp", "tp")


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

    `wire={"tp": (latency_s, bytes_per_s)}` emulates a wire on an axis (see link.py); `data` takes dp's.
    Raises ValueError where pp x dp x cp x tp is not the number of ranks.
    """

    def __init__(self, pp: int = 1, dp: int = 1, cp: int = 1, tp: int = 1,
                 wire: dict[str, tuple[float, float]] | None = None, device: str = "cpu"):
        sizes = (pp, dp, cp, tp)
        check_fits(world_size(), pp, dp, cp, tp)
        self.ledger, self.device = Ledger(), device
        wire = wire or {}
        self._wire = {"data": wire["dp"], **wire} if "dp" in wire else wire
        groups = _groups(device, sizes, dist.group.WORLD if dist.is_initialized() else None)
        for name in (*AXES, "data", "world"):
            setattr(self, name, self._axis(name, *groups[name]))
        self.rank = self.world.rank

    def _axis(self, name, ranks, group):
        me = dist.get_rank() if dist.is_initialized() else 0
        link = Link(*self._wire[name]) if name in self._wire else None
        return Axis(name, ranks.index(me), ranks, group, self.ledger, link)

    def __repr__(self):
        return "Mesh(" + ", ".join(f"{a}={getattr(self, a).size}" for a in AXES) + f", rank={self.rank})"


def world_size() -> int:
    """Ranks in this run; 1 in a plain process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_fits(world: int, pp: int, dp: int, cp: int, tp: int) -> None:
    """Raise ValueError, with a mesh that would fit, unless pp x dp x cp x tp is `world`."""
    if min(pp, dp, cp, tp) < 1:
        raise ValueError(f"every axis needs at least 1 rank, got pp={pp} dp={dp} cp={cp} tp={tp}; leave unused axes at 1")
    if pp * dp * cp * tp != world:
        rest = pp * cp * tp
        hint = f"--dp {world // rest}" if world % rest == 0 else f"{rest * max(1, world // rest)} ranks"
        raise ValueError(f"pp={pp} x dp={dp} x cp={cp} x tp={tp} = {pp * dp * cp * tp} does not fit {world} ranks; "
                         f"try {hint}")


@functools.cache                             # a gloo group keeps threads for ever: make each mesh's groups once
def _groups(device, sizes, world_group):
    """{axis: (global ranks, group)} of this rank; `world_group` keys the cache to one life of torch.distributed."""
    if prod(sizes) == 1:
        return dict.fromkeys((*AXES, "data", "world"), ((0,), None))
    mesh = init_device_mesh(device, sizes, mesh_dim_names=AXES)
    axes = {name: _line(mesh[name]) for name in AXES}
    pp, dp, cp, tp = sizes
    axes["world"] = (tuple(range(prod(sizes))), world_group)
    axes["data"] = axes["dp"] if cp == 1 else axes["cp"] if dp == 1 else _line(mesh["dp", "cp"]._flatten("data"))
    return axes


def _line(mesh):
    ranks = tuple(mesh.mesh.flatten().tolist())
    return ranks, mesh.get_group() if len(ranks) > 1 else None
