"""Who did what when: a row a stage, a box a computation with its micro-batch's number in it.

Drawn from the clock's spans (parallel/pipeline/simulator.py) or from a run's: `measured` takes what
train/step.execute returned on each rank, less the time it stood waiting for messages. So the two can be
compared.
"""
from collections.abc import Sequence

from nanoinfra.lab import draw
from nanoinfra.parallel.pipeline.schedules import Backward, BackwardInput, BackwardWeight, Forward
from nanoinfra.parallel.pipeline.simulator import Timeline

COLOURS = {Forward: draw.BLUE, Backward: draw.ORANGE, BackwardInput: draw.PINK, BackwardWeight: draw.GREEN}
NAMES = {Forward: "forward", Backward: "backward", BackwardInput: "backward to the input",
         BackwardWeight: "backward to the weights"}
IDLE = "#ececec"                             # of a step, what lies behind the boxes
GAP = 1.1                                    # rows between two panels, for the lower one's name


def gantt(panels: dict[str, Timeline], title: str = "", unit: str = "ms") -> draw.Picture:
    """A panel for each {name: Timeline}, one time axis; beside the name the share of the step that is idle.

    Times are in s and shown in `unit`: "s" or "ms"; with any other they are shown as they are. Of several
    chunks a stage has, the later ones are pale.
    """
    scale, rows = {"ms": 1e3}.get(unit, 1), sum(len(each.spans) + GAP for each in panels.values())
    longest = max(each.step for each in panels.values())
    picture, axes = draw.new_figure(9.4, 1.35 + 0.32 * rows, title)
    ticks, top = {}, 0.0
    for name, timeline in panels.items():
        idle = sum(timeline.idle) / len(timeline.idle) / timeline.step
        axes.text(0, top + 0.25, f"{name}: {scale * timeline.step:.4g} {unit}, idle {idle:.0%}", fontsize=10,
                  weight="bold", va="center")
        top += GAP
        for r, spans in enumerate(timeline.spans):
            axes.barh(top + r, scale * timeline.step, height=0.86, color=IDLE)
            for what, begin, end in spans:
                _box(axes, top + r, scale * begin, scale * end, what, (end - begin) / longest)
            ticks[top + r] = f"stage {r}"
        top += len(timeline.spans)
    _finish(axes, ticks, top, scale * longest, unit)
    _legend(picture, {what for each in panels.values() for spans in each.spans for what, _, _ in spans})
    return picture


def measured(ranks: Sequence[Sequence], ledgers: Sequence[Sequence] = ()) -> Timeline:
    """The Timeline of a run from `execute`'s spans on each rank, in s since the first computation began.

    `ledgers[r]` are rank r's rows: a computation begins once it has what it waited for. `time.monotonic` is
    one clock for all ranks of a host, not of two.
    """
    ledgers = ledgers or [[] for _ in ranks]
    found = [[(what, begin + _waited(rows, begin, end), end) for what, begin, end in spans
              if type(what) in COLOURS] for spans, rows in zip(ranks, ledgers)]
    start = min(begin for spans in found for _, begin, _ in spans)
    return Timeline([[(what, begin - start, end - start) for what, begin, end in spans] for spans in found])


def _waited(rows, begin, end):
    """Seconds of a computation that began with waiting for messages."""
    return sum(row.wait_s for row in rows if row.op in ("send", "recv") and begin <= row.end <= end)


def _box(axes, y, begin, end, what, share):
    colour = COLOURS[type(what)]
    colour = draw.pale(colour) if what.chunk else colour
    axes.barh(y, end - begin, left=begin, height=0.86, color=colour, edgecolor="white", linewidth=0.8)
    if share > 0.011 * len(str(what.micro)):
        dark = type(what) is not Forward or what.chunk
        axes.text((begin + end) / 2, y, str(what.micro), ha="center", va="center", fontsize=8,
                  color="black" if dark else "white", clip_on=True)


def _finish(axes, ticks, bottom, right, unit):
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axes.set(xlim=(0, right), ylim=(bottom - 0.4, -0.4), xlabel=unit)
    axes.grid(False, axis="y")


def _legend(picture, drawn):
    """Of the computations that were drawn; below the axes."""
    axes, kinds = picture.figure.axes[0], {type(what) for what in drawn}
    for kind in (kind for kind in COLOURS if kind in kinds):
        axes.barh(0, 0, color=COLOURS[kind], label=NAMES[kind])
    if any(what.chunk for what in drawn):
        axes.barh(0, 0, color=draw.pale(draw.BLUE), label="pale: later chunks")
    axes.barh(0, 0, color=IDLE, label="idle")
    picture.figure.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)
