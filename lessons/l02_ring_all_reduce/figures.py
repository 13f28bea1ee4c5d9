"""Pictures of lesson 02: the ledgers of all ranks on one time axis, and the chunks on a ring of ranks."""
import math
from collections.abc import Sequence

from nanoinfra.lab.draw import BLUE, GREEN, RED, SERIES_COLOURS, SKY, Picture, lighten_colour, new_figure


def comm_timeline(ledgers: Sequence[Sequence], title: str = "what each rank did", label: str = "tag",
                  hidden: bool = True) -> Picture:
    """Draw each rank's communication over time from its records: hidden (pale) or waited for (full colour).

    Colours stand for `label`: "tag", "op" or "axis". Time is in ms from the first record; blank is compute.
    With `hidden=False` a bar is a whole call, from begin to end.
    """
    rows = [(rank, row) for rank, ledger in enumerate(ledgers) for row in ledger]
    start = min(row.start_time for _, row in rows)
    names = list(dict.fromkeys(getattr(row, label) or row.op for _, row in rows))
    colours = dict(zip(names, SERIES_COLOURS * math.ceil(len(names) / len(SERIES_COLOURS))))
    picture, axes = new_figure(9, 1.5 + 0.5 * len(ledgers), title)
    for rank, row in rows:
        begin, end = (1e3 * (t - start) for t in (row.start_time, row.end_time))
        wait = 1e3 * row.wait_seconds if hidden else end - begin
        _call(axes, rank, begin, end, wait, colours[getattr(row, label) or row.op])
    for name in names:
        axes.barh(0, 0, color=colours[name], label=name)
    if hidden:
        axes.barh(0, 0, color=lighten_colour(colours[names[0]]), label="pale: hidden behind compute")
    axes.set_yticks(range(len(ledgers)), [f"rank {r}" for r in range(len(ledgers))])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("ms")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def _call(axes, y, begin, end, wait, colour):
    bar = {"height": 0.62, "edgecolor": "white"}
    axes.barh(y, end - begin, left=begin, color=lighten_colour(colour), **bar)
    axes.barh(y, wait, left=end - wait, color=colour, zorder=3, **bar)


def ring_diagram(summed: Sequence[Sequence[int]], sent: Sequence[int], title: str = "") -> Picture:
    """Draw the ranks on a ring: rank r's chunk c is a sum over `summed[r][c]` ranks (green: over all).

    Rank r sends its chunk `sent[r]`, which is outlined, to its right neighbour.
    """
    n = len(summed)
    picture, axes = new_figure(7, 5.6, title)
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
        colour = GREEN if count == n else lighten_colour(BLUE) if count == 1 else SKY
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
