"""Figures of lesson 01: bytes by kind, bytes over a step, magnitudes in float16, and loss curves."""
from collections.abc import Callable, Sequence

import torch

from nanoinfra.lab.draw import BLUE, GREEN, GREY, ORANGE, RED, SERIES_COLOURS, Picture, new_figure
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes

_FLOAT16_RANGES = ((-40, -25, 0.16, "zero"), (-25, -14, 0.07, "fewer than 11 bits"),
                   (16, 22, 0.16, "infinite"))


def stacked_byte_bars(rows: dict[str, dict[str, int]], title: str = "bytes by kind") -> Picture:
    """Stacked bars of {row: {kind: bytes}}. Kinds stand in the order of the row with the most kinds."""
    kinds = max(rows.values(), key=len)
    largest = max(sum(row.values()) for row in rows.values())
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
                       if largest >= s)
    picture, axes = new_figure(8.6, 1.1 + 0.55 * len(rows), title)
    for y, row in enumerate(rows.values()):
        left = 0
        for colour, kind in zip(SERIES_COLOURS, kinds):
            axes.barh(y, row.get(kind, 0) / scale, 0.66, left, color=colour, edgecolor="white",
                      label="" if y else kind)
            left += row.get(kind, 0) / scale
        axes.text(left, y, f" {left:.3g} {unit}", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=unit, xlim=(0, 1.15 * largest / scale))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def bytes_after_each_operator(storages: LiveTensorBytes, act: Callable[[], object]) -> list[int]:
    """The live bytes after each operator of `act()`, as `storages` with mark_operators records them."""
    start = len(storages.marks)
    act()
    return [held for _, held in storages.marks[start:]]


def bytes_over_step(lives: dict[str, list[Sequence[int]]], phases: Sequence[str], line: tuple[str, int],
                    title: str) -> Picture:
    """Plot live bytes over the phases of a step, {name: [bytes after each operator, for each phase]}.

    Phases are drawn equally wide. `line` is (label, bytes) of a dashed line.
    """
    picture, axes = new_figure(8.6, 3.8, title)
    for colour, (name, held) in zip((GREY, BLUE, *SERIES_COLOURS[2:]), lives.items()):
        x = [phase + k / len(part) for phase, part in enumerate(held) for k in range(1, len(part) + 1)]
        y = [n / 1e6 for part in held for n in part]
        axes.step([0, *x], [y[0], *y], color=colour, label=f"{name}: at most {max(y):.3g} MB")
        axes.fill_between([0, *x], [y[0], *y], step="pre", color=colour, alpha=0.15, linewidth=0)
    axes.axhline(line[1] / 1e6, color=ORANGE, linestyle="--", label=line[0])
    axes.set_xticks([phase + 0.5 for phase in range(len(phases))], phases)
    axes.set(xlim=(0, len(phases)), ylabel="MB", ylim=(0, 1.3 * axes.get_ylim()[1]))
    axes.grid(False, axis="x")
    for phase in range(1, len(phases)):
        axes.axvline(phase, ymax=0.86, color=GREY, linewidth=0.8)
    axes.legend(fontsize=10, frameon=False, ncols=3)
    return picture


def float16_histogram(numbers: dict[str, torch.Tensor], title: str) -> Picture:
    """Histograms of the magnitudes of {name: numbers}, with the ranges where float16 fails."""
    edges = torch.arange(-48, 22.5, 0.5)
    picture, axes = new_figure(8.6, 3.6, title)
    for colour, (name, x) in zip((BLUE, ORANGE), numbers.items()):
        sizes = x.abs().float().log2()
        share = torch.histogram(sizes.cpu(), edges).hist * 100 / len(sizes)
        axes.stairs(share.tolist(), edges.tolist(), fill=True, color=colour, alpha=0.8,
                    label=f"{name}: {(sizes < -25).float().mean():.0%} become zero")
    for left, right, shade, text in _FLOAT16_RANGES:
        axes.axvspan(left, right, color="black", alpha=shade, linewidth=0)
        axes.text(left + 0.4, 0.97, text, transform=axes.get_xaxis_transform(), va="top", fontsize=10)
    axes.set(xlim=(-40, 22), xlabel="log2 of the size", ylabel="% of the numbers")
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    axes.legend(loc="center right", bbox_to_anchor=(0.9, 0.6), fontsize=10, frameon=False)
    return picture


def loss_curves(runs: dict[str, tuple[Sequence[int], Sequence[float]]], title: str) -> Picture:
    """Plot {name: (steps, held-out losses)}. Each curve is thinner than the one before."""
    picture, axes = new_figure(8.6, 4.2, title)
    for i, (colour, (name, (steps, nats))) in enumerate(zip((GREY, RED, BLUE, ORANGE, GREEN), runs.items())):
        width = max(1.4, 8 - 2.2 * i)
        axes.plot(steps, nats, "o-", color=colour, linewidth=width, markersize=width + 2, label=name)
    axes.set(xlabel="steps", ylabel="held-out loss, nats a byte")
    axes.legend(fontsize=10, frameon=False)
    return picture
