"""Three dimensions, run and drawn: what the trainer's own step sends on each axis, and where its axes lie.

`step_of` and `paced` run inside each rank, on the real stage of the trainer (train/replica.py). The pictures
are of coordinates and of counted bytes; an axis is as wide as what it carries. Predicted is a line.
"""
import time
from collections.abc import Callable, Sequence
from math import prod

import torch

from nanoinfra.data.source import IGNORE
from nanoinfra.dist import comm
from nanoinfra.dist.mesh import Mesh, world_size
from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.lab import draw
from nanoinfra.lab.nap import emulate
from nanoinfra.lab.predict import quantity
from nanoinfra.parallel.schedules import ReduceGrads
from nanoinfra.train.config import MeshFlags, ModelFlags, TrainFlags
from nanoinfra.train.replica import Replica
from nanoinfra.train.step import execute

COLOURS = {"tp": draw.BLUE, "pp": draw.ORANGE, "dp": draw.GREEN}
WAYS = {"pp": (1.5, 0.0), "dp": (0.55, 0.5), "tp": (0.0, 1.0)}       # of an axis on paper, a place on it


def step_of(config: ModelConfig, sizes: dict[str, int], batch: int, seq: int, sequences: int,
            norm: Callable | None = None) -> dict:
    """On each of pp x dp x tp ranks, of a step in float64: where it stands, what it has and what it sent.

    A step is `sequences` in micro-batches of `batch`, of unequal valid tokens. "grads": {name: (box, part)};
    "rows": the ledger's; `norm(grads, mesh, ends)` may say a norm of its own beside the trainer's.
    """
    if world_size() != prod(sizes.values()):
        raise ValueError(f"{sizes} is {prod(sizes.values())} ranks, and here are {world_size()}")
    mesh = Mesh(**sizes)
    replica, batches = _stage(config, mesh, batch, seq, sequences)
    mesh.ledger.take()
    replica.begin(batches, sum(seq - g % seq for g in range(sequences)))
    execute(replica.schedule(len(batches))[:-1], replica)                # all but the optimizer's step
    grads = {name: (replica.parallel.box(name), grad.clone()) for name, grad in replica.grads.items()}
    own = norm(replica.grads, mesh, mesh.ends("pp")) if norm else None
    mesh.ledger.rows = [row for row in mesh.ledger.rows if row.tag in _TAGS]        # not those of `norm`
    replica.step()
    return {"at": {axis: getattr(mesh, axis).rank for axis in sizes}, "grads": grads, "own": own,
            "norm": replica.grad_norm, "loss": replica.loss.item(), "rows": mesh.ledger.take()}


def paced(config: ModelConfig, sizes: dict[str, int], wire: dict[str, tuple[float, float]], seconds: float,
          batch: int, seq: int, sequences: int, repeats: int) -> list[float]:
    """On each rank: seconds of a step until gradients are summed, in each repeat, on an emulated wire.

    A layer sleeps `seconds` forward for a micro-batch and twice that back, as an accelerator would compute.
    """
    mesh, trials = Mesh(**sizes, wire=wire), []
    replica, batches = _stage(config, mesh, batch, seq, sequences)
    emulate(replica.parallel.each[0].model.blocks, 2 * seconds / batch)
    for _ in range(repeats + 1):
        comm.barrier(mesh.world)
        begin = time.monotonic()
        replica.begin(batches, sequences * seq)
        order = replica.schedule(len(batches))
        execute(order[:order.index(ReduceGrads()) + 1], replica)
        trials.append(time.monotonic() - begin)
    return trials[1:]                                                    # the first one warms up


def bytes_by_axis(rows: Sequence) -> dict[str, int]:
    """{axis: payload bytes} of a rank's rows; a message counts where it is sent, the tied weight apart."""
    found = {"tp": 0, "pp": 0, "dp": 0, "tied": 0, "scalars": 0}
    for row in rows:
        key = row.tag if row.tag in found else {"data": "dp"}.get(row.axis, row.axis)
        found[key] += row.payload * (row.op != "recv")
    return found


def largest_error(parts: Sequence[dict], want: dict) -> float:
    """Of ranks' {name: (box, part)} against one rank's: ||got - want|| / max(||want||, 1e-6 ||all||)."""
    whole, worst = {name: grad for name, (_, grad) in want.items()}, 0.0
    least = 1e-6 * torch.stack([grad.norm() for grad in whole.values()]).norm()
    seen = {name: torch.zeros(grad.shape) for name, grad in whole.items()}
    for name, (box, part) in (item for found in parts for item in found.items()):
        place = tuple(slice(*ends) for ends in box)
        seen[name][place] = 1
        worst = max(worst, float((part - whole[name][place]).norm() / max(whole[name].norm(), least)))
    return worst if all(there.all() for there in seen.values()) else float("inf")


def cubes(panels: dict[str, tuple[Callable, int, dict[str, float]]], sizes: dict[str, int],
          title: str) -> draw.Picture:
    """{label: (rank -> {axis: place}, ranks of a node, {axis: bytes a rank sends on it})}, side by side.

    A dot is a rank, in the colour of its node; a line is as wide as what travels on it, red between nodes.
    """
    picture, axes = draw.canvas(3.4 * len(panels), 3.7, title)
    for i, (label, (where, node, sent)) in enumerate(panels.items()):
        at = {rank: where(rank) for rank in range(prod(sizes.values()))}
        spot = {rank: _spot(place, 3.4 * i) for rank, place in at.items()}
        for axis in sizes:
            width = 1.2 + 9 * sent.get(axis, 0) / max([*sent.values(), 1])
            for a, b in ((a, b) for a in at for b in at if _next(at[a], at[b], axis)):
                colour = draw.RED if a // node != b // node else COLOURS[axis]
                axes.plot(*zip(spot[a], spot[b]), color=colour, linewidth=width, zorder=1, alpha=0.75,
                          solid_capstyle="butt", linestyle=(0, (1.2, 0.4)) if colour == draw.RED else "-")
        for rank, (x, y) in spot.items():
            axes.plot(x, y, "o", markersize=23, color=draw.COLOURS[::-1][rank // node % 6],
                      markeredgecolor="white", markeredgewidth=2, zorder=2)
            axes.text(x, y, str(rank), color="white", ha="center", va="center", weight="bold", zorder=3)
        axes.text(3.4 * i + 1.0, -0.55, label, ha="center", va="top", fontsize=10.5)
    for axis in sizes:
        axes.plot([], [], color=COLOURS[axis], linewidth=5, label=axis)
    axes.plot([], [], color=draw.RED, linewidth=5, linestyle=(0, (1.2, 0.4)), label="leaves its node")
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.06), ncols=4, fontsize=10, frameon=False)
    axes.set(xlim=(-0.4, 3.4 * len(panels) - 0.9), ylim=(-1.15, 2.25))
    axes.axis("off")
    return picture


def axis_bars(rows: dict[str, dict[str, float]], predicted: dict[str, float], title: str, unit: str,
              xlabel: str) -> draw.Picture:
    """A bar a row, of its axes' numbers; where `predicted` has the row a black line."""
    picture, axes = draw.canvas(8.8, 1.4 + 0.5 * len(rows), title)
    most = max(sum(parts.values()) for parts in rows.values())
    for y, (label, parts) in enumerate(rows.items()):
        left = 0.0
        for axis, value in parts.items():
            axes.barh(y, value, 0.62, left, color=COLOURS.get(axis, draw.GREY), edgecolor="white")
            left += value
        if label in predicted:
            axes.plot([predicted[label]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
        axes.text(max(left, predicted.get(label, 0)), y, "  " + quantity(left, unit), va="center",
                  fontsize=10)
    for axis in dict.fromkeys(axis for parts in rows.values() for axis in parts):
        axes.barh(0, 0, color=COLOURS.get(axis, draw.GREY), label=axis)
    if predicted:
        axes.plot([], [], color="black", label="predicted")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=xlabel, xlim=(0, 1.18 * most))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


_TAGS = ("layers", "ends", "loss", "tp grads", "grads", "tied", "activations", "gradients", "scalars")


def _stage(config, mesh, batch, seq, sequences):
    """The trainer's stage of this rank, and its data rank's micro-batches [(x, y)], (B, T) each."""
    flags = TrainFlags(ModelFlags(dtype="float64"), mesh=MeshFlags(pp=mesh.pp.size, tp=mesh.tp.size))
    x, y = torch.randint(config.vocab, (2, sequences, seq), generator=torch.Generator().manual_seed(0))
    for g in range(sequences):
        y[g, :g % seq] = IGNORE
    x, y = (part[mesh.data.rank::mesh.data.size].split(batch) for part in (x, y))
    return Replica(config, flags, mesh), list(zip(x, y))


def _spot(place, left):
    x, y = (sum(WAYS[axis][k] * n for axis, n in place.items()) for k in (0, 1))
    return left + x, y


def _next(a, b, axis):
    """Is b one further on `axis`, and otherwise at a's place?"""
    return b == a | {axis: a[axis] + 1}
