"""What a run says of itself: metrics.jsonl, a line on the terminal, loss.png and a Perfetto timeline.

One line a step, written by rank 0, flushed, floats at full precision. Times are timed, bytes counted. The
timeline (https://perfetto.dev) has one row of instructions and one of collectives a rank.
"""
import json
import math
import os
import sys
from itertools import accumulate
from pathlib import Path

import torch

from nanoinfra.distributed import comm


class Log:
    """metrics.jsonl of a run directory; `go_on_after` keeps the lines up to that step and drops the rest.

    `lost` says in words which of them are not there; it is empty where all are.
    """

    def __init__(self, path: Path, go_on_after: int = 0):
        lines, bad = _sorted_out(path) if go_on_after else ([], 0)
        kept = [line for line in lines if line["step"] <= go_on_after]
        self.lost = ""
        if bad or len(kept) < go_on_after:
            self.lost = (f"{path.name} holds {len(kept)} of the {go_on_after} steps so far"
                         + f"; {bad} lines that are no step's are dropped" * bool(bad))
        replace(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(path, "a")

    def write(self, line: dict) -> None:
        """Append one step."""
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def read(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl, in order; what a crash, a full disk or a hand has broken is left out."""
    return _sorted_out(path)[0]


def _sorted_out(path):
    """(lines of steps, number of lines that are none); an end without a newline is a line not yet written."""
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    texts = whole.split(b"\n") if whole else []
    steps = {line["step"]: line for text in texts if (line := _step(text))}          # the last one of a step
    return [steps[step] for step in sorted(steps)], len(texts) - len(steps)


def _step(text):
    """A line of metrics.jsonl, None unless it is a step's."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and type(line.get("step")) is int and line["step"] >= 0
    numbers = [line.get("loss"), line.get("tokens"), line.get("held_out_bpb", 0.0)] if whole else [None]
    return line if all(type(x) in (int, float) and math.isfinite(x) for x in numbers) else None


def replace(path: Path, text: str) -> None:
    """Write a small file anew; a crash leaves the old one or the new one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def sent(rows) -> dict[str, int]:
    """Payload bytes by axis; scalars for loss, norm and counts under a key of their own."""
    total = {}
    for row in rows:
        key = "scalars" if row.tag == "scalars" else row.axis
        total[key] = total.get(key, 0) + row.payload
    return total


def largest(numbers: list[float], axis) -> list[float]:
    """Each number's largest value on any rank."""
    return comm.all_reduce(torch.tensor(numbers, dtype=torch.float64), axis, "scalars", op="max").tolist()


def held(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Bar:
    """A live line on a terminal; a plain one every ten seconds elsewhere."""

    def __init__(self, steps: int, seconds: float | None, start: int, elapsed: float = 0.0):
        self.seconds, self.bar, self.spoke = seconds, None, -math.inf
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            self.bar = Progress(TextColumn("step {task.fields[step]}"), BarColumn(),
                                TextColumn("{task.description}"),
                                TimeRemainingColumn(elapsed_when_finished=True), console=Console(stderr=True))
            self.task = self.bar.add_task("", total=seconds or steps, step=start,
                                          completed=elapsed if seconds else start)
            self.bar.start()

    def show(self, line: dict, elapsed: float, last: bool = False) -> None:
        """Show a step's line of metrics, `elapsed` seconds into the run."""
        says = f"loss {line['loss']:.3f}  {line['tokens_per_s']:,.0f} tokens/s"
        if "held_out_bpb" in line:
            says += f"  held-out {line['held_out_bpb']:.3f} bits/byte"
        if self.bar:
            done = elapsed if self.seconds else line["step"]
            self.bar.update(self.task, completed=done, step=line["step"], description=says)
        elif last or "held_out_bpb" in line or elapsed - self.spoke > 10:
            print(f"step {line['step']}  {says}", flush=True)
            self.spoke = elapsed

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar:
            self.bar.stop()


def plot(path: Path, png: Path, title: str = "") -> None:
    """Draw loss (and held-out bits per byte, where there are any) over tokens from metrics.jsonl."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    lines = read(path)
    if not lines:
        return
    millions = [seen / 1e6 for seen in accumulate(line["tokens"] for line in lines)]
    losses = [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(millions, losses, color="#56B4E9", alpha=0.5, lw=1, label="each step")
    axes.plot(millions, smooth(losses), color="#0072B2", lw=2, label="running mean")
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


def smooth(values: list[float], weight: float | None = None) -> list[float]:
    """An exponential running mean over about a twentieth of the values, corrected for its start."""
    weight = max(0.0, 1 - 20 / len(values)) if weight is None else weight
    out, mean, norm = [], 0.0, 0.0
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out


def trace_events(rank: int, spans, rows) -> list[dict]:
    """One rank's instructions and collectives as Perfetto events; times in microseconds."""
    def event(name, track, begin, end, **args):
        return {"name": name, "ph": "X", "pid": rank, "tid": track, "ts": begin * 1e6,
                "dur": (end - begin) * 1e6, "args": args}
    named = [{"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}]
    return named + [event(type(what).__name__, "step", a, b, **vars(what)) for what, a, b in spans] + [
        event(row.op, f"wire {row.axis}", row.begin, row.end, tag=row.tag, payload_bytes=row.payload,
              wait_ms=row.wait_s * 1e3) for row in rows]
