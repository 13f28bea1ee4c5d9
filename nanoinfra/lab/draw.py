"""Figures in one style, by matplotlib: predicted numbers are lines, measured ones are dots or bars.

Each function returns a `Picture`, which a notebook displays and `.save(path)` writes as PNG. The colours are
those of Okabe and Ito (2008), which colour-blind readers can tell apart.
"""
import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
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
    """A matplotlib figure that a notebook displays as PNG."""

    def __init__(self, figure: Figure):
        self.figure = figure

    def save(self, path: Path | str) -> Path:
        """Write the figure to `path` as PNG."""
        self.figure.savefig(path, format="png", dpi=MATPLOTLIB_STYLE["savefig.dpi"], facecolor="white")
        return Path(path)

    def _repr_png_(self):
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=_NOTEBOOK_DPI, facecolor="white")
        width = round(self.figure.get_figwidth() * _NOTEBOOK_DPI / 2)  # sharp on dense screens
        return out.getvalue(), {"width": width, "alt": self.figure.axes[0].get_title(loc="left")}


def new_figure(width_inches: float = 8.0, height_inches: float = 4.0,
               title: str = "") -> tuple[Picture, Axes]:
    """An empty figure in the style of all lessons, and its axes."""
    with rc_context(MATPLOTLIB_STYLE):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        axes = figure.add_subplot(title=title)
        axes.tick_params(length=0)
    return Picture(figure), axes


def plot_curves(predicted_lines: dict[str, tuple], measured_points: dict[str, tuple],
                x_label: str, y_label: str,
                title: str = "", log_scale: bool = True, dashed_labels: Sequence[str] = ()) -> Picture:
    """Plot lines and points, {label: (xs, ys)}. The same label has the same colour.

    Labels in `dashed_labels` get dashed lines and open dots, so that curves below them stay visible.
    """
    picture, axes = new_figure(8, 4.6, title)
    colours = dict(zip(dict.fromkeys([*predicted_lines, *measured_points]), SERIES_COLOURS))
    for label, (xs, ys) in predicted_lines.items():
        style = (0, (3, 3)) if label in dashed_labels else "-"
        axes.plot(xs, ys, color=colours[label], linestyle=style, label=f"{label}, predicted")
    for label, (xs, ys) in measured_points.items():
        open_dot = {"markerfacecolor": "none", "markersize": 10, "markeredgewidth": 1.8}
        dot = open_dot if label in dashed_labels else {"markeredgecolor": "white"}
        axes.plot(xs, ys, "o", color=colours[label], label=f"{label}, measured", **dot)
    if log_scale:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=10)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(ncols=2 if len(predicted_lines) + len(measured_points) > 3 else 1, fontsize=10, frameon=False)
    return picture


def draw_vertical_line(picture: Picture, x: float, text: str) -> Picture:
    """Add a thin vertical line at `x`, with `text` beside its lower end."""
    axes = picture.figure.axes[0]
    axes.axvline(x, ymax=0.7, color=GREY, linewidth=1.2, zorder=1)              # below the legend
    axes.annotate(text, (x, 0.03), (6, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                  color="#444444", fontsize=10)
    return picture


def label_x_axis_in_bytes(picture: Picture, sizes: Sequence[int]) -> Picture:
    """Put ticks at `sizes` along the x axis, labelled in KiB or MiB."""
    axes = picture.figure.axes[0]
    axes.set_xticks(sizes, [f"{s >> 20} MiB" if s >= 1 << 20 else f"{s >> 10} KiB" for s in sizes])
    axes.minorticks_off()
    return picture


def lighten_colour(colour: str) -> tuple[float, float, float]:
    """`colour` mixed with white, as (red, green, blue)."""
    return tuple(1 - 0.3 * (1 - part) for part in to_rgb(colour))
