"""Pictures of real objects in one house style: measured rows, ledgers, rings, curves.

Each function returns a `Picture`: the last line of a cell shows it, `.save(path)` keeps it. The colours are
those of Okabe and Ito (2008), which colour-blind readers can tell apart. Predicted is a line, measured a dot
or a bar.
"""
import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from nanoinfra.lab.compare import Row
from nanoinfra.lab.predict import quantity

BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY = "#0072B2 #E69F00 #009E73 #D55E00 #56B4E9 #CC79A7 #8a8a8a".split()
COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
HOUSE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 12, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
    "xtick.color": "#444444", "ytick.color": "#444444", "axes.labelcolor": "#222222", "legend.frameon": False,
    "lines.linewidth": 2.2, "lines.markersize": 6.5, "figure.dpi": 100, "savefig.dpi": 160,
}
SCREEN = 180                                 # dots an inch in a notebook


class Picture:
    """A figure that shows itself in a notebook and saves itself at readable size."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def save(self, path: Path | str) -> Path:
        """Write a PNG."""
        self.figure.savefig(path, format="png", dpi=HOUSE["savefig.dpi"], facecolor="white")
        return Path(path)

    def _repr_png_(self):
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=SCREEN, facecolor="white")
        width = round(self.figure.get_figwidth() * SCREEN / 2)                        # sharp on dense screens
        return out.getvalue(), {"width": width, "alt": self.figure.axes[0].get_title(loc="left")}


def canvas(width: float = 8.0, height: float = 4.0, title: str = ""):
    """(Picture, axes) of an empty figure in the house style, in inches."""
    with rc_context(HOUSE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot(title=title)
        axes.tick_params(length=0)
    return Picture(figure), axes


def bars(rows: Sequence[Row], title: str = "predicted and measured") -> Picture:
    """A bar a row of `compare(...).lines`: measured over predicted, with the tolerance as a band around 1."""
    picture, axes = canvas(8, 1.3 + 0.55 * len(rows), title)
    for y, row in enumerate(rows):
        colour = {"pass": GREEN, "miss": RED}.get(row.verdict, GREY)
        axes.barh(y, row.ratio, height=0.5, color=colour)
        axes.text(row.ratio + 0.02, y, f"{quantity(row.measured.value, row.measured.unit)} of "
                  f"{quantity(row.predicted, row.measured.unit)}", va="center", fontsize=10)
        if row.tolerance:
            axes.barh(y, 2 * row.tolerance, left=1 - row.tolerance, height=0.8, color=ORANGE, alpha=0.25)
    axes.axvline(1, color="#222222", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("measured / predicted")
    axes.set_xlim(0, max(1.5, 1.45 * max(row.ratio for row in rows)))
    return picture


def curves(lines: dict[str, tuple], points: dict[str, tuple], x: str, y: str, title: str = "",
           log: bool = True, dashed: Sequence[str] = ()) -> Picture:
    """Predicted `lines` and measured `points`, {label: (xs, ys)}; a label in both shares its colour.

    Labels in `dashed` get dashes and open dots, so that what lies beneath them is seen too.
    """
    picture, axes = canvas(8, 4.6, title)
    colours = dict(zip(dict.fromkeys([*lines, *points]), COLOURS))
    for label, (xs, ys) in lines.items():
        style = (0, (3, 3)) if label in dashed else "-"
        axes.plot(xs, ys, color=colours[label], linestyle=style, label=f"{label}, predicted")
    for label, (xs, ys) in points.items():
        dot = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.8} if label in dashed else {
            "markeredgecolor": "white"}
        axes.plot(xs, ys, "o", color=colours[label], label=f"{label}, measured", **dot)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(ncols=2 if len(lines) + len(points) > 3 else 1, fontsize=10, frameon=False)
    return picture


def mark(picture: Picture, x: float, text: str) -> Picture:
    """A thin upright line at `x` with `text` beside its foot."""
    axes = picture.figure.axes[0]
    axes.axvline(x, ymax=0.7, color=GREY, linewidth=1.2, zorder=1)              # below the legend
    axes.annotate(text, (x, 0.03), (6, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  color="#444444", fontsize=10)
    return picture


def size_ticks(picture: Picture, sizes: Sequence[int]) -> Picture:
    """Write the bytes of `sizes` along x, as 64 KiB and 16 MiB."""
    axes = picture.figure.axes[0]
    axes.set_xticks(sizes, [f"{s >> 20} MiB" if s >= 1 << 20 else f"{s >> 10} KiB" for s in sizes])
    axes.minorticks_off()
    return picture


def timeline(ledgers: Sequence[Sequence], title: str = "what each rank did", label: str = "tag",
             hidden: bool = True) -> Picture:
    """A line a rank from its ledger's Rows: communication hidden (pale) or waited for (full colour).

    Coloured by `label`: "tag", "op" or "axis". Time in ms from the first row's begin; blank is compute. Where
    every call waits, nothing can hide: with `hidden=False` a bar is one call, from begin to end.
    """
    rows = [(rank, row) for rank, ledger in enumerate(ledgers) for row in ledger]
    start = min(row.start_time for _, row in rows)
    names = list(dict.fromkeys(getattr(row, label) or row.op for _, row in rows))
    colours = dict(zip(names, COLOURS * math.ceil(len(names) / len(COLOURS))))
    picture, axes = canvas(9, 1.5 + 0.5 * len(ledgers), title)
    for rank, row in rows:
        begin, end = (1e3 * (t - start) for t in (row.start_time, row.end_time))
        wait = 1e3 * row.wait_seconds if hidden else end - begin
        _call(axes, rank, begin, end, wait, colours[getattr(row, label) or row.op])
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    if hidden:
        axes.barh(0, 0, color=_pale(colours[names[0]]), label="pale: hidden behind compute")
    axes.set_yticks(range(len(ledgers)), [f"rank {r}" for r in range(len(ledgers))])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("ms")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def _call(axes, y, begin, end, wait, colour):
    bar = {"height": 0.62, "edgecolor": "white"}
    axes.barh(y, end - begin, left=begin, color=_pale(colour), **bar)
    axes.barh(y, wait, left=end - wait, color=colour, zorder=3, **bar)


def _pale(colour):
    return tuple(1 - 0.3 * (1 - part) for part in to_rgb(colour))


def ring(summed: Sequence[Sequence[int]], sent: Sequence[int], title: str = "") -> Picture:
    """Ranks on a ring: rank r's chunk c is a sum over `summed[r][c]` ranks (over all: green).

    Rank r sends its chunk `sent[r]`, outlined, to the right.
    """
    n = len(summed)
    picture, axes = canvas(7, 5.6, title)
    angle = [math.pi / 2 - 2 * math.pi * r / n for r in range(n)]
    for r in range(n):
        x, y = 1.25 * math.cos(angle[r]), math.sin(angle[r])
        _chunks(axes, x, y, summed[r], sent[r])
        axes.text(x, y + 0.2, f"rank {r}", ha="center", va="center", weight="bold")
        _hop(axes, angle[r], 2 * math.pi / n, f"chunk {sent[r]}")
    axes.set_xlim(-1.8, 1.8)
    axes.set_ylim(-1.35, 1.35)
    axes.axis("off")
    return picture


def _chunks(axes, x, y, summed, sent):
    width, n = min(0.17, 0.9 / len(summed)), len(summed)
    for c, count in sorted(enumerate(summed), key=lambda chunk: chunk[0] == sent):     # the outline last
        left = x + (c - n / 2) * width
        colour = GREEN if count == n else _pale(BLUE) if count == 1 else SKY
        axes.bar(left, 0.2, width, y - 0.1, align="edge", color=colour,
                 edgecolor=RED if c == sent else "white", linewidth=2.5 if c == sent else 1)
        axes.text(left + width / 2, y, str(count), ha="center", va="center", fontsize=10)


def _hop(axes, start, turn, text):
    gap = 0.28 * turn
    ends = [(1.25 * math.cos(a), math.sin(a)) for a in (start - gap, start - turn + gap)]
    axes.annotate("", ends[1], ends[0], arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 1.8,
                                                    "connectionstyle": "arc3,rad=-0.15"})
    middle = start - turn / 2
    axes.text(0.8 * math.cos(middle), 0.68 * math.sin(middle), text, ha="center", va="center", color=RED)
