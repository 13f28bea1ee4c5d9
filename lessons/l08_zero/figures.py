"""Figures of ZeRO: which rank owns which rows, how many bytes it holds, when a layer is gathered and freed.

The numbers are those of measurements.py and of ZeRO's own `rows`. A predicted number is a black line.
"""
from collections.abc import Sequence

from nanoinfra.lab import draw


def row_shard_map(ranks: Sequence[dict[str, tuple[int, int]]], shapes: dict[str, tuple[int, ...]],
                  title: str = "rows of each rank (hatched: padding to equal shards)") -> draw.Picture:
    """Draw the rows of each parameter in the colours of the ranks that own them; `ranks[r]`: {name: rows}."""
    picture, axes = draw.new_figure(8.8, 1.2 + 0.3 * len(shapes), title)
    most = max(shape[0] for shape in shapes.values())
    for y, (name, shape) in enumerate(shapes.items()):
        c = -(-shape[0] // len(ranks))
        for r, (rows, colour) in enumerate(zip(ranks, draw.SERIES_COLOURS)):
            start, stop = rows[name]
            label = "" if y else f"rank {r}"
            axes.barh(y, stop - start, 0.74, start, color=colour, edgecolor="white", label=label)
            if zeros := c - stop + start:
                axes.barh(y, zeros, 0.74, stop, color="white", hatch="//////", edgecolor=colour)
        axes.text(c * len(ranks), y, f"  {shape}: {c} rows a rank", va="center", fontsize=10)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="rows", xlim=(0, 1.45 * most))
    axes.legend(loc="lower right", fontsize=10, frameon=False)
    return picture


def held_byte_bars(rows: dict[str, tuple[dict[str, int], int, float]], title: str) -> draw.Picture:
    """Stacked bars of {row: ({kind: bytes held}, bytes alive at the peak, bytes predicted)}."""
    picture, axes = draw.new_figure(8.8, 1.3 + 0.55 * len(rows), title)
    whole, bar = sum(next(iter(rows.values()))[0].values()), {"height": 0.62, "edgecolor": "white"}
    for y, (kinds, peak, predicted) in enumerate(rows.values()):
        left, besides = 0, {"besides, at the peak": peak - sum(kinds.values())}
        for colour, (kind, size) in zip((*draw.SERIES_COLOURS[:4], "#e2e2e2"), (kinds | besides).items()):
            axes.barh(y, size / 1e6, left=left / 1e6, color=colour, label="" if y else kind, **bar)
            left += size
        axes.plot([predicted / 1e6] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2,
                  label="" if y else "predicted")
        share = f"  kept: {sum(kinds.values()) / whole:.0%}"
        axes.text(peak / 1e6, y, share if y else "", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="MB", xlim=(0, 1.02 * max(peak for _, peak, _ in rows.values()) / 1e6))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def gather_timeline(ways: dict[str, tuple[list, list]], title: str) -> draw.Picture:
    """Timelines of {name: (times, records)} of `run_layer_stack`: when a layer is gathered and computes."""
    picture, axes = draw.new_figure(9.4, 1.2 + 1.5 * len(ways), title)
    ticks, marks = {}, {}
    for way, (name, (times, rows)) in enumerate(ways.items()):
        top, start = way * (len(times) + 1), rows[0].start_time
        ticks |= {top + layer: f"{name}, layer {layer}" for layer in range(len(times))}
        for layer, moments in enumerate(times):
            for land, free in zip(moments[::2], moments[1::2]):
                marks["whole, and computing"] = axes.barh(top + layer, free - land, 0.8, land - start,
                                                          color=draw.GREY)
        marks |= _transfers(axes, top, len(times), rows, start)
        waited = f"  waits {sum(row.wait_seconds for row in rows) * 1e3:.0f} ms"
        axes.text(max(row.end_time for row in rows) - start, top + len(times) / 2 - 0.5, waited, va="center",
                  fontsize=11)
    axes.set_yticks([*ticks], ticks.values(), fontsize=10)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlim=(0, 1.13 * axes.get_xlim()[1]), xlabel="seconds")
    axes.legend(marks.values(), marks, loc="upper center", fontsize=10, bbox_to_anchor=(0.5, -0.18), ncols=3,
                frameon=False)
    return picture


def _transfers(axes, top, layers, rows, start):
    """Gathers come forward and then backward, gradients leave backward; {legend: its bars}."""
    down, marks = range(layers - 1, -1, -1), {}
    for op, order, label, colour in (
            ("all_gather", [*range(layers), *down], "weights gathered (pale: hidden)", draw.BLUE),
            ("reduce_scatter", down, "gradient scattered (pale: hidden)", draw.ORANGE)):
        bar = {"height": 0.8, "color": colour}
        for row, layer in zip((row for row in rows if row.op == op), order):
            axes.barh(top + layer, row.end_time - row.start_time, left=row.start_time - start, alpha=0.3,
                      **bar)
            marks[label] = axes.barh(top + layer, row.wait_seconds,
                                     left=row.end_time - start - row.wait_seconds, **bar)
    return marks
