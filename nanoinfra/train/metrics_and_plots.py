"""Metrics of a run: metrics.jsonl, the progress bar, the loss curve loss.png and a Perfetto timeline.

Rank 0 writes one line a step, flushed, with floats at full precision. Times are timed, bytes are counted. The
timeline (https://perfetto.dev) has one row of instructions and one of collectives for each rank.
"""
import json
import math
import os
import sys
from itertools import accumulate
from pathlib import Path

import torch

from nanoinfra.distributed import comm


class MetricsLog:
    """The file metrics.jsonl; when a run resumes, lines after step `resumed_after_step` are dropped.

    `missing_steps_warning` says in words which earlier lines are missing; it is "" when none is.
    """

    def __init__(self, path: Path, resumed_after_step: int = 0):
        lines, bad = _sorted_out(path) if resumed_after_step else ([], 0)
        kept = [line for line in lines if line["step"] <= resumed_after_step]
        self.missing_steps_warning = ""
        if bad or len(kept) < resumed_after_step:
            of = f"{len(kept)} of the {resumed_after_step} steps so far"
            self.missing_steps_warning = (f"{path.name} holds {of}"
                                          + f"; {bad} lines that are no step's are dropped" * bool(bad))
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a")

    def write_step(self, line: dict) -> None:
        """Append the line of one step."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def read_metrics(path: Path) -> list[dict]:
    """Read the steps of a metrics.jsonl, in order; broken lines are left out."""
    return _sorted_out(path)[0]


def _sorted_out(path):
    """(lines of steps, number of broken lines); an unfinished last line counts as not yet written."""
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    texts = whole.split(b"\n") if whole else []
    steps = {line["step"]: line for text in texts if (line := _step(text))}          # the last one of a step
    return [steps[step] for step in sorted(steps)], len(texts) - len(steps)


def _step(text):
    """Parse a line of metrics.jsonl; None unless it is a valid line of a step."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0
    numbers = [line.get("loss"), line.get("tokens"), line.get("held_out_bpb", 0.0)] if whole else [None]
    return line if all(type(x) in (int, float) and math.isfinite(x) for x in numbers) else None


def replace_file(path: Path, text: str) -> None:
    """Replace a small file atomically: a crash leaves the old text or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def payload_bytes_by_axis(records) -> dict[str, int]:
    """Sum the payload bytes of logged collectives by axis; loss, norm and counts under "scalars"."""
    total = {}
    for row in records:
        key = "scalars" if row.tag == "scalars" else row.axis_name
        total[key] = total.get(key, 0) + row.payload_bytes
    return total


def all_reduce_max(numbers: list[float], axis) -> list[float]:
    """Return each number's maximum over the ranks of `axis`."""
    return comm.all_reduce(torch.tensor(numbers, dtype=torch.float64), axis, "scalars", op="max").tolist()


def distinct_storage_bytes(tensors) -> int:
    """Sum the bytes of the distinct storages behind `tensors`; views count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class ProgressBar:
    """The progress of a run: a live bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, steps: int, max_seconds: float | None, start_step: int, elapsed_seconds: float = 0.0):
        self.max_seconds, self.bar = max_seconds, None
        self.printed_at = -math.inf          # seconds into the run
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            self.bar = Progress(TextColumn("step {task.fields[step]}"), BarColumn(),
                                TextColumn("{task.description}"),
                                TimeRemainingColumn(elapsed_when_finished=True), console=Console(stderr=True))
            self.task = self.bar.add_task("", total=max_seconds or steps, step=start_step,
                                          completed=elapsed_seconds if max_seconds else start_step)
            self.bar.start()

    def show_step(self, line: dict, elapsed_seconds: float, last: bool = False) -> None:
        """Show a step's line of metrics, `elapsed_seconds` into the run; the `last` is always printed."""
        says = f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s"
        if "held_out_bpb" in line:
            says += f"  held-out {line['held_out_bpb']:.3f} bits/byte"
        if self.bar:
            done = elapsed_seconds if self.max_seconds else line["step"]
            self.bar.update(self.task, completed=done, step=line["step"], description=says)
        elif last or "held_out_bpb" in line or elapsed_seconds - self.printed_at > 10:
            print(f"step {line['step']}  {says}", flush=True)
            self.printed_at = elapsed_seconds

    def close(self) -> None:
        """Stop the live bar and restore the terminal."""
        if self.bar:
            self.bar.stop()


def plot_loss_curve(path: Path, png: Path, title: str = "") -> None:
    """Draw loss (and held-out bits per byte, where there are any) over tokens from metrics.jsonl."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    lines = read_metrics(path)
    if not lines:
        return
    millions = [seen / 1e6 for seen in accumulate(line["tokens"] for line in lines)]
    losses = [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(millions, losses, color="#56B4E9", alpha=0.5, lw=1, label="each step")
    axes.plot(millions, _running_mean(losses), color="#0072B2", lw=2, label="running mean")
    axes.set(xlabel="million tokens", ylabel="training loss, nats per token")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    scores = [(x, line["held_out_bpb"]) for x, line in zip(millions, lines) if "held_out_bpb" in line]
    if scores:
        _plot_scores(axes.twinx(), scores)
    new = png.with_name(png.name + ".new")
    figure.savefig(new, dpi=120, format="png")
    os.replace(new, png)


def _plot_scores(axes, scores):
    values, orange = [value for _, value in scores], "#D55E00"
    axes.plot(*zip(*scores), "o-", color=orange, ms=5)
    axes.set_ylim(0.9 * min(values), 1.15 * max(values))
    axes.set_ylabel("held-out bits per byte", color=orange)
    axes.annotate(f"{values[-1]:.3f}", scores[-1], (0, 8), textcoords="offset points", ha="right",
                  color=orange)
    axes.spines[["top"]].set_visible(False)


def _running_mean(values: list[float], weight: float | None = None) -> list[float]:
    """An exponential running mean over about a twentieth of the values, corrected for its start."""
    weight = max(0.0, 1 - 20 / len(values)) if weight is None else weight
    out = []
    mean, norm = 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def perfetto_trace_events(rank: int, spans, records) -> list[dict]:
    """Return one rank's instructions and collectives as Perfetto events; times in microseconds."""
    def event(name, track, begin, end, **args):
        return {"name": name, "ph": "X", "pid": rank, "tid": track, "ts": begin * 1e6,
                "dur": (end - begin) * 1e6, "args": args}
    named = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}]
    return named + [event(type(what).__name__, "step", a, b, **vars(what)) for what, a, b in spans] + [
        event(row.op, f"wire {row.axis_name}", row.start_time, row.end_time, tag=row.tag,
              payload_bytes=row.payload_bytes,
              wait_ms=row.wait_seconds * 1e3) for row in records]
