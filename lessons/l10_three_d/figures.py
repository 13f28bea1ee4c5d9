"""Runs and figures of 3D parallelism: steps timed on emulated links, the mesh as a cube, bytes on each axis.

`time_emulated_steps` runs inside each rank, on the trainer's own stage (train/training_pipeline_stage.py). In
the figures an axis is drawn as wide as the bytes that it carries; predicted numbers are lines.
"""
import time
from collections.abc import Callable, Sequence
from math import prod

from nanoinfra.config import ModelConfig
from nanoinfra.distributed import comm
from nanoinfra.lab import draw
from nanoinfra.lab.instruments.emulated_compute import emulate_compute_time
from nanoinfra.lab.instruments.gradient_parity import (
    count_valid_targets,
    make_mesh_from_flags,
    make_stage_and_batches,
)
from nanoinfra.lab.predict import format_quantity
from nanoinfra.parallel.pipeline.schedules import ReduceGrads
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.step import execute_schedule

AXIS_COLOURS = {"tp": draw.BLUE, "pp": draw.ORANGE, "dp": draw.GREEN}
# of an axis on paper, a place on it
_AXIS_DIRECTIONS = {"pp": (1.5, 0.0), "dp": (0.55, 0.5), "tp": (0.0, 1.0)}
_INTER_NODE_DASHES = (0, (1.2, 0.4))  # dashes of a line between nodes


def time_emulated_steps(config: ModelConfig, flags: TrainFlags, seq: int,
                        wire: dict[str, tuple[float, float]], seconds: float, repeats: int) -> list[float]:
    """Time steps on each rank, until gradients are summed, on emulated links: [seconds of each repeat].

    A layer sleeps for `seconds` in the forward of a micro-batch and twice as long in backward.
    """
    mesh, trials = make_mesh_from_flags(flags, wire), []
    replica, batches = make_stage_and_batches(config, flags, mesh, seq)
    emulate_compute_time(replica.parallel_model.chunks[0].model.blocks, 2 * seconds / flags.data.micro_batch)
    order = replica.build_step_schedule(len(batches))
    for _ in range(repeats + 1):
        comm.barrier(mesh.world)
        begin = time.monotonic()
        replica.begin_step(batches, count_valid_targets(flags.data.global_batch, seq))
        execute_schedule(order[:order.index(ReduceGrads()) + 1], replica)
        trials.append(time.monotonic() - begin)
    return trials[1:]                                                    # the first one warms up


def payload_bytes_by_axis(rows: Sequence) -> dict[str, int]:
    """{axis: payload bytes} of a rank's communication records. Messages count for the sender; "tied" is
    apart."""
    found = {"tp": 0, "pp": 0, "dp": 0, "tied": 0}
    for row in rows:
        key = row.tag if row.tag == "tied" else {"data": "dp"}.get(row.axis_name, row.axis_name)
        found[key] += row.payload_bytes * (row.op != "recv")
    return found


def mesh_cubes(panels: dict[str, tuple[Callable, int, dict[str, float]]], sizes: dict[str, int],
               title: str) -> draw.Picture:
    """Draw meshes side by side: {label: (rank -> {axis: place}, ranks of a node, {axis: bytes a rank
    sends})}.

    A dot is a rank, in the colour of its node. A line is as wide as the bytes on it, and red between nodes.
    """
    right, top = _spot({axis: n - 1 for axis, n in sizes.items()})
    wide, below = right + 1.35, 0.75 + 0.2 * max(label.count("\n") + 1 for label in panels)
    picture, axes = draw.new_figure(max(5.2, wide * len(panels)), top + below + 0.9, title)
    for i, (label, (where, node, sent)) in enumerate(panels.items()):
        at = {rank: where(rank) for rank in range(prod(sizes.values()))}
        _lines(axes, wide * i, at, node, sent)
        for rank, place in at.items():
            x, y = _spot(place, wide * i)
            axes.plot(x, y, "o", markersize=23, color=draw.SERIES_COLOURS[::-1][rank // node % 6],
                      markeredgecolor="white", markeredgewidth=2, zorder=2)
            axes.text(x, y, str(rank), color="white", ha="center", va="center", weight="bold", zorder=3)
        axes.text(wide * i - 0.2, -0.35, label, va="top", fontsize=10.5)
    for axis in (axis for axis, n in sizes.items() if n > 1):
        axes.plot([], [], color=AXIS_COLOURS[axis], linewidth=5, label=axis)
    axes.plot([], [], color=draw.RED, linewidth=5, linestyle=_INTER_NODE_DASHES, label="leaves its node")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, -0.03), ncols=4, fontsize=10, frameon=False)
    axes.set(xlim=(-0.4, wide * len(panels) - 0.9), ylim=(-below, top + 0.3), aspect="equal", anchor="W")
    axes.axis("off")
    return picture


def _lines(axes, left, at, node, sent):
    """Draw a line between ranks that are neighbours on one axis."""
    for axis, a, b in ((axis, a, b) for axis in AXIS_COLOURS for a in at for b in at
                       if _next(at[a], at[b], axis)):
        away = a // node != b // node
        axes.plot(*zip(_spot(at[a], left), _spot(at[b], left)),
                  color=draw.RED if away else AXIS_COLOURS[axis],
                  linewidth=1.5 + 9 * sent.get(axis, 0) / max([*sent.values(), 1]), zorder=1, alpha=0.75,
                  solid_capstyle="butt", linestyle=_INTER_NODE_DASHES if away else "-")


def stacked_axis_bars(rows: dict[str, dict[str, float]], predicted: dict[str, float], title: str, unit: str,
                      xlabel: str) -> draw.Picture:
    """Stacked bars of {row: {axis: number}}, with a black line at the predicted sum of a row."""
    picture, axes = draw.new_figure(8.8, 1.4 + 0.5 * len(rows), title)
    most = max(sum(parts.values()) for parts in rows.values())
    for y, (label, parts) in enumerate(rows.items()):
        left = 0.0
        for axis, value in parts.items():
            axes.barh(y, value, 0.62, left, color=AXIS_COLOURS.get(axis, draw.GREY), edgecolor="white")
            left += value
        if label in predicted:
            axes.plot([predicted[label]] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2)
        axes.text(max(left, predicted.get(label, 0)), y, "  " + format_quantity(left, unit), va="center",
                  fontsize=10)
    for axis in dict.fromkeys(axis for parts in rows.values() for axis in parts):
        axes.barh(0, 0, color=AXIS_COLOURS.get(axis, draw.GREY), label=axis)
    if predicted:
        axes.plot([], [], color="black", label="predicted")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=xlabel, xlim=(0, 1.18 * most))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def _spot(place, left=0.0):
    x, y = (sum(_AXIS_DIRECTIONS[axis][k] * n for axis, n in place.items()) for k in (0, 1))
    return left + x, y


def _next(a, b, axis):
    """Whether b is the next place after a on `axis`."""
    return b == a | {axis: a[axis] + 1}
