"""Pictures of real objects in one house style: measured rows, ledgers, rings, curves.

Each function returns a `Picture`: the last line of a cell shows it, `.save(path)` keeps it. The colours are
those of Okabe and Ito (2008), which colour-blind readers can tell apart. Predicted is a line, measured a dot
or a bar.
"""
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

BLUE, ORANGE, GREEN, RED, SKY, PINK, GREY = "#0072B2 #E69F00 #009E73 #D55E00 #56B4E9 #CC79A7 #8a8a8a".split()
SERIES_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
MATPLOTLIB_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 12, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GREY, "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
    "xtick.color": "#444444", "ytick.color": "#444444", "axes.labelcolor": "#222222", "legend.frameon": False,
    "lines.linewidth": 2.2, "lines.markersize": 6.5, "figure.dpi": 100, "savefig.dpi": 160,
}
_NOTEBOOK_DPI = 180                                 # dots an inch in a notebook


class Picture:
    """A figure that shows itself in a notebook and saves itself at readable size."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def save(self, path: Path | str) -> Path:
        """Write a PNG."""
        self.figure.savefig(path, format="png", dpi=MATPLOTLIB_STYLE["savefig.dpi"], facecolor="white")
        return Path(path)

    def _repr_png_(self):
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=_NOTEBOOK_DPI, facecolor="white")
        width = round(self.figure.get_figwidth() * _NOTEBOOK_DPI / 2)  # sharp on dense screens
        return out.getvalue(), {"width": width, "alt": self.figure.axes[0].get_title(loc="left")}


def new_figure(width: float = 8.0, height: float = 4.0, title: str = ""):
    """(Picture, axes) of an empty figure in the house style, in inches."""
    with rc_context(MATPLOTLIB_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot(title=title)
        axes.tick_params(length=0)
    return Picture(figure), axes


def plot_curves(lines: dict[str, tuple], points: dict[str, tuple], x: str, y: str, title: str = "",
           log: bool = True, dashed: Sequence[str] = ()) -> Picture:
    """Predicted `lines` and measured `points`, {label: (xs, ys)}; a label in both shares its colour.

    Labels in `dashed` get dashes and open dots, so that what lies beneath them is seen too.
    """
    picture, axes = new_figure(8, 4.6, title)
    colours = dict(zip(dict.fromkeys([*lines, *points]), SERIES_COLOURS))
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


def draw_vertical_line(picture: Picture, x: float, text: str) -> Picture:
    """A thin upright line at `x` with `text` beside its foot."""
    axes = picture.figure.axes[0]
    axes.axvline(x, ymax=0.7, color=GREY, linewidth=1.2, zorder=1)              # below the legend
    axes.annotate(text, (x, 0.03), (6, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  color="#444444", fontsize=10)
    return picture


def label_x_axis_in_bytes(picture: Picture, sizes: Sequence[int]) -> Picture:
    """Write the bytes of `sizes` along x, as 64 KiB and 16 MiB."""
    axes = picture.figure.axes[0]
    axes.set_xticks(sizes, [f"{s >> 20} MiB" if s >= 1 << 20 else f"{s >> 10} KiB" for s in sizes])
    axes.minorticks_off()
    return picture


def pale(colour: str) -> tuple[float, float, float]:
    """`colour` mixed with white."""
    return tuple(1 - 0.3 * (1 - part) for part in to_rgb(colour))
