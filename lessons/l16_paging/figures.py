"""Figures of continuous batching and paged KV memory, drawn from a scheduler's log (replay.py).

A batch timeline has a row for each request, in order of arrival, and a column for each step. A block map
shows which sequence's tokens lie in which block of the pool.
"""
from collections.abc import Iterator, Sequence

from lessons.l16_paging.replay import (
    LoggingScheduler,
    TraceRequest,
    replay_three_policies,
    replay_trace,
    trace_sizes,
)
from nanoinfra.formulas import paged_kv_memory
from nanoinfra.lab import draw
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.serve.engine.block_pool import BlockPool

_STEP_KINDS = {"prompt": (draw.ORANGE, "prompt, or a chunk of it"), "decode": (draw.BLUE, "a new token"),
               "again": (draw.PINK, "computed again"), "idle": ("#c9c9c9", "done, seat kept"),
               "waiting": ("#f3e2bb", "waits"), "preempted": ("#efc3a8", "was sent away, waits")}
_WIDTH_INCHES, GAP, ROW = 9.4, 3.2, 0.105  # inches; rows between panels, for the lower one's name; inches


def batch_timeline(panels: dict[str, LoggingScheduler], title: str = "") -> draw.Picture:
    """A timeline for each {name: scheduler after a replay}: what each request did in each step."""
    rows = sum(len(each.order) + GAP for each in panels.values())
    picture, axes = draw.new_figure(_WIDTH_INCHES, 1.3 + ROW * rows, title)
    top, seen, ticks = 0.0, set(), {}
    for name, scheduler in panels.items():
        axes.text(0, top + 0.3 * GAP, f"{name}: {_said(scheduler)}", fontsize=10, weight="bold", va="center")
        top += 0.75 * GAP
        for y, kind, begin, end in _runs(scheduler):
            seen.add(kind)
            axes.barh(top + y, end - begin, 0.82, begin, color=_STEP_KINDS[kind][0], align="edge")
        for step in scheduler.log:
            for y in step.preempted:
                axes.plot(step.at, top + y + 0.41, "x", color=draw.RED, markersize=5, markeredgewidth=1.8)
        n = len(scheduler.order)
        ticks |= {top + 0.41: "first", top + n - 0.59: "last"}
        top += n + 0.25 * GAP
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set(xlim=(0, max(each.steps for each in panels.values())), ylim=(top, 0), xlabel="step")
    axes.grid(False, axis="y")
    _legend(picture, axes, seen)
    return picture


def _legend(picture, axes, seen):
    """Of what was drawn; below the axes."""
    for kind in (kind for kind in _STEP_KINDS if kind in seen):
        axes.barh(0, 0, color=_STEP_KINDS[kind][0], label=_STEP_KINDS[kind][1])
    if any(line.get_marker() == "x" for line in axes.lines):
        axes.plot([], [], "x", color=draw.RED, linestyle="none", label="sent away")
    picture.figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def pool_usage(panels: dict[str, LoggingScheduler], title: str = "") -> draw.Picture:
    """Plot the slots of the pool over the steps: with a token, allocated and empty, and free."""
    picture, axes = draw.new_figure(_WIDTH_INCHES, 1.1 + 1.5 * len(panels), title)
    axes.remove()
    every = picture.figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    longest = max(each.steps for each in panels.values())
    for axes, (name, each) in zip(every, panels.items()):
        share = _fill(axes, each)
        axes.set_title(f"{name}: {share:.0%} of what is taken holds a token", fontsize=10, loc="left",
                       weight="bold", pad=4)
        axes.set_xlim(0, longest)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0, labelsize=9)
    every[0].figure.suptitle(title, fontsize=12.5, weight="bold", x=0.01, ha="left")
    every[len(every) // 2].set_ylabel("places in memory")
    every[-1].set_xlabel("step")
    picture.figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                          fontsize=9, frameon=False)
    return picture


def _fill(axes, scheduler):
    """Draw a panel of `memory`; the share of what is taken that holds a token."""
    size, log = scheduler.block_pool.block_size, scheduler.log
    places, edges = size * len(scheduler.block_pool.ref_counts), [*(step.at for step in log), scheduler.steps]
    taken = [size * step.used for step in log]
    tokens = [places_taken - step.empty for places_taken, step in zip(taken, log)]
    axes.stairs([places] * len(log), edges, fill=True, color="#ececec", label="free")
    axes.stairs(taken, edges, fill=True, color=draw.ORANGE, label="taken, and empty")
    axes.stairs(tokens, edges, fill=True, color=draw.BLUE, label="tokens")
    axes.set(ylim=(0, places), yticks=[0, places // 2, places])
    return sum(tokens) / sum(taken)


def block_map(scheduler: LoggingScheduler, title: str = "", columns: int = 16) -> draw.Picture:
    """Draw the blocks of the pool, `columns` in a row: dark with tokens, pale where empty, white if free.

    A block shows the numbers of all sequences that hold it.
    """
    blocks, n = scheduler.block_pool, len(scheduler.block_pool.ref_counts)
    rows = -(-n // columns)
    picture, axes = draw.new_figure(_WIDTH_INCHES, 0.9 + 0.42 * rows, title)
    held = list(_held(scheduler))
    for block in range(n):
        x, y = block % columns, block // columns
        axes.barh(y, 0.9, 0.74, x + 0.05, color="white", edgecolor="#cccccc", linewidth=0.8)
        mine = [(job, filled) for at, job, filled in held if at == block]
        for job, filled in mine[:1]:
            colour = draw.SERIES_COLOURS[job % len(draw.SERIES_COLOURS)]
            axes.barh(y, 0.9, 0.74, x + 0.05, color=draw.lighten_colour(colour))
            axes.barh(y, 0.9 * filled / blocks.block_size, 0.74, x + 0.05, color=colour)
        full = mine and 2 * mine[0][1] > blocks.block_size and len(mine) == 1
        axes.text(x + 0.5, y, ", ".join(str(job) for job, _ in mine), ha="center", va="center",
                  fontsize=8 if len(mine) < 4 else 6, color="white" if full else "black")
    axes.set(xlim=(0, columns), ylim=(rows - 0.4, -0.6), xticks=[], yticks=range(rows))
    axes.set_yticklabels([f"block {columns * row}" for row in range(rows)], fontsize=8)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(False)
    return picture


def steps_over_pool_size(jobs: list[TraceRequest], memories: Sequence[int], longest: int,
                         size: int) -> draw.Picture:
    """Plot the steps that each policy takes over the size of KV memory, and the least number possible."""
    runs = [replay_three_policies(jobs, places, longest, size) for places in memories]
    lines = {way: (memories, [paged_kv_memory.min_steps_with_kv_memory(trace_sizes(jobs), places, size, whole)
                              for places in memories])
             for way, whole in (("Orca", longest), ("pages", None))}
    ways = ("Orca", "pages", "static batches")
    dots = {way: (memories, [each[way].steps for each in runs]) for way in ways}
    picture = draw.plot_curves(lines, dots, "KV memory, tokens", "steps", f"{len(jobs)} requests at once")
    picture.figure.axes[0].set_xticks(memories)
    return picture


def waste_over_block_size(jobs: list[TraceRequest], places: int, sizes: Sequence[int]) -> draw.Picture:
    """Plot the slots that a sequence leaves empty over the block size."""
    left = [replay_trace(jobs, LoggingScheduler(BlockPool(places // size, size))).left.values()
            for size in sizes]
    lines = {"on average": (sizes, [paged_kv_memory.mean_unused_slots_per_sequence(size) for size in sizes]),
             "at most": (sizes, [size - 1 for size in sizes])}
    dots = {"on average": (sizes, [sum(each) / len(each) for each in left]),
            "at most": (sizes, [max(each) for each in left])}
    return draw.plot_curves(lines, dots, "tokens of a block", "places a sequence leaves empty",
                            "what pages waste")


def _held(scheduler) -> Iterator[tuple[int, int, int]]:
    """(block, job, tokens of it in there) of everyone who runs."""
    size = scheduler.block_pool.block_size
    for sequence in scheduler.running:
        for i, block in enumerate(sequence.block_table):
            yield block, scheduler.order[sequence], max(0, min(size, sequence.num_computed_tokens - i * size))


def _runs(scheduler) -> Iterator[tuple[int, str, int, int]]:
    """(row, kind, begin, end) of each stretch of steps in which a job did the same."""
    did: dict[int, list] = {}
    for step in scheduler.log:
        kinds = {i: kind for i, (*_, kind) in step.work.items()}
        kinds |= step.waiting | dict.fromkeys(step.idle, "idle")
        for i, kind in kinds.items():
            mine = did.setdefault(i, [])
            if mine and mine[-1][0] == kind != "prompt" and mine[-1][2] == step.at:
                mine[-1][2] += 1
            else:
                mine.append([kind, step.at, step.at + 1])
    yield from ((i, *run) for i in sorted(did) for run in did[i])


def _said(scheduler):
    """Its steps and tokens a step, in a line."""
    computed, steps = scheduler.computed, scheduler.steps
    sent = scheduler.counts["preemptions"]
    more = f", {sent} sent away" if sent else ""
    return f"{steps} steps, {computed / steps:.1f} tokens a step{more}"


def policy_table(panels: dict[str, LoggingScheduler], title: str = "") -> DisplayTable:
    """A table with a row for each {name: scheduler after a replay}."""
    rows = [(name, str(each.steps), str(each.computed), f"{each.computed / each.steps:.1f}",
             str(max(len(step.work) for step in each.log)), str(max(step.used for step in each.log)),
             str(sum(len(step.waiting) for step in each.log)), str(each.counts["preemptions"]))
            for name, each in panels.items()]
    return DisplayTable(title, ("", "steps", "tokens computed", "computed a step", "most in a batch",
                                "most blocks",
                                "steps waited, all", "sent away"), rows)
