"""Gantt charts of pipelines: a row for each stage, and a box for each computation, with its micro-batch's
number.

Drawn from the clock's spans (parallel/pipeline/simulator.py) or from a run's: `measured_timeline` takes what
train/step.execute returned on each rank, less the time it stood waiting for messages. So the two can be
compared.
"""
from collections.abc import Sequence

from nanoinfra.lab import draw
from nanoinfra.parallel.pipeline.schedules import Backward, BackwardInput, BackwardWeight, Forward
from nanoinfra.parallel.pipeline.simulator import StepTimeline

COMPUTE_COLOURS = {Forward: draw.BLUE, Backward: draw.ORANGE, BackwardInput: draw.PINK,
                   BackwardWeight: draw.GREEN}
_COMPUTE_NAMES = {Forward: "forward", Backward: "backward", BackwardInput: "backward to the input",
                  BackwardWeight: "backward to the weights"}
IDLE_COLOUR = "#ececec"                             # the background of a step
_ROWS_BETWEEN_PANELS = 1.1  # rows between two panels, for the lower one's name


def gantt_chart(panels: dict[str, StepTimeline], title: str = "", unit: str = "ms") -> draw.Picture:
    """Draw a panel for each {name: StepTimeline} on one time axis, with the idle share of the step.

    Times are given in s and shown in `unit` "s" or "ms"; with another unit they are shown as they are. The
    later ones of several chunks of a stage are pale.
    """
    scale = {"ms": 1e3}.get(unit, 1)
    rows = sum(len(each.compute_spans) + _ROWS_BETWEEN_PANELS for each in panels.values())
    longest = max(each.step_seconds for each in panels.values())
    picture, axes = draw.new_figure(9.4, 1.35 + 0.32 * rows, title)
    ticks, top = {}, 0.0
    for name, timeline in panels.items():
        idle = sum(timeline.idle_seconds) / len(timeline.idle_seconds) / timeline.step_seconds
        axes.text(0, top + 0.25, f"{name}: {scale * timeline.step_seconds:.4g} {unit}, idle {idle:.0%}",
                  fontsize=10, weight="bold", va="center")
        top += _ROWS_BETWEEN_PANELS
        for r, spans in enumerate(timeline.compute_spans):
            axes.barh(top + r, scale * timeline.step_seconds, height=0.86, color=IDLE_COLOUR)
            for what, begin, end in spans:
                _box(axes, top + r, scale * begin, scale * end, what, (end - begin) / longest)
            ticks[top + r] = f"stage {r}"
        top += len(timeline.compute_spans)
    _finish(axes, ticks, top, scale * longest, unit)
    _legend(picture,
            {what for each in panels.values() for spans in each.compute_spans for what, _, _ in spans})
    return picture


def measured_timeline(ranks: Sequence[Sequence], ledgers: Sequence[Sequence] = ()) -> StepTimeline:
    """The StepTimeline of a real run, from each rank's spans of `execute_schedule`.

    Its times are in s since the first computation began. `ledgers[r]` has rank r's communication records,
    whose waiting time is taken off the computations. All ranks must be on one host, because
    `time.monotonic` differs between hosts.
    """
    ledgers = ledgers or [[] for _ in ranks]
    found = [[(what, begin + _waited(rows, begin, end), end) for what, begin, end in spans
              if type(what) in COMPUTE_COLOURS] for spans, rows in zip(ranks, ledgers)]
    start = min(begin for spans in found for _, begin, _ in spans)
    return StepTimeline([[(what, begin - start, end - start) for what, begin, end in spans]
                         for spans in found])


def _waited(rows, begin, end):
    """Seconds at the beginning of a computation that were spent waiting for messages."""
    return sum(row.wait_seconds for row in rows if row.op in ("send", "recv")
               and begin <= row.end_time <= end)


def _box(axes, y, begin, end, what, share):
    colour = COMPUTE_COLOURS[type(what)]
    colour = draw.lighten_colour(colour) if what.chunk else colour
    axes.barh(y, end - begin, left=begin, height=0.86, color=colour, edgecolor="white", linewidth=0.8)
    if share > 0.011 * len(str(what.micro_batch)):
        dark = type(what) is not Forward or what.chunk
        axes.text((begin + end) / 2, y, str(what.micro_batch), ha="center", va="center", fontsize=8,
                  color="black" if dark else "white", clip_on=True)


def _finish(axes, ticks, bottom, right, unit):
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axes.set(xlim=(0, right), ylim=(bottom - 0.4, -0.4), xlabel=unit)
    axes.grid(False, axis="y")


def _legend(picture, drawn):
    """Of the computations that were drawn; below the axes."""
    axes, kinds = picture.figure.axes[0], {type(what) for what in drawn}
    for kind in (kind for kind in COMPUTE_COLOURS if kind in kinds):
        axes.barh(0, 0, color=COMPUTE_COLOURS[kind], label=_COMPUTE_NAMES[kind])
    if any(what.chunk for what in drawn):
        axes.barh(0, 0, color=draw.lighten_colour(draw.BLUE), label="pale: later chunks")
    axes.barh(0, 0, color=IDLE_COLOUR, label="idle")
    picture.figure.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)
