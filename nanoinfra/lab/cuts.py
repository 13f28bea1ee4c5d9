"""Pictures of tensor parallelism: who holds which part of a layer, what it keeps, where a wire ends its use.

The boxes are TensorParallel's own, tensors are those that autograd kept, times those of ranks. Predicted is a
line, black or in its colour.
"""
from collections.abc import Sequence

import torch
from matplotlib.patches import Rectangle

from nanoinfra.lab import draw

STREAM = ("embed", "norm1", "q", "k", "v", "o", "norm2", "up", "down")         # in the order tokens meet them
KEPT = {"the norms": ("norm",), "what q, k, v and up read": ("read",), "between f and g": ("",)}
GPT2 = ("norm1 x", "norm1 mean", "norm1 std", "read by q, k, v", "q", "k", "v", "o reads", "attention's sums",
        "norm2 x", "norm2 mean", "norm2 std", "read by up", "up", "gelu")      # sdpa; in autograd's order


def cut_map(ranks: Sequence[dict], shapes: dict[str, tuple[int, ...]],
            title: str = "a layer, and the embedding: who holds what (grey: everyone all of it)") -> draw.Picture:
    """Each matrix of a GPT-2 layer as it is stored, outputs down and inputs across, beside it its bias.

    `ranks[r]` is rank r's {parameter: box}, `shapes` those of the whole.
    """
    picture, axes = draw.canvas(9.4, 4.2, title)
    left, unit = 0.0, shapes["blocks.0.norm1.weight"][0]
    for module in STREAM:
        name = next(name for name in shapes if name.split(".")[-2] == module)
        height, width = shapes[name] if len(shapes[name]) == 2 else (shapes[name][0], 0.12 * unit)
        _parts(axes, [boxes[name] for boxes in ranks], shapes[name], left, width)
        if bias := name.replace("weight", "bias") if len(shapes[name]) == 2 and module != "embed" else "":
            _parts(axes, [boxes[bias] for boxes in ranks], shapes[bias], left + width + 0.06 * unit, 0.12 * unit)
        axes.text(left + width / 2, height + 0.12 * unit, module, ha="center", va="top", fontsize=10)
        left += width + (0.3 if bias else 0.12) * unit
        if module in ("norm1", "norm2", "v", "o", "up", "down"):
            sign = {"norm1": "f", "norm2": "f", "o": "g", "down": "g", "v": "⋯", "up": "⋯"}[module]
            axes.text(left + 0.22 * unit, 0.5 * unit, sign, ha="center", va="center", fontsize=14,
                      weight="bold", color=draw.BLUE if sign in "fg" else draw.GREY)
            left += 0.5 * unit
        left += 0.1 * unit
    for r in range(len(ranks)):
        axes.bar(0, 0, color=draw.COLOURS[r], label=f"rank {r}")
    axes.set(xlim=(-0.1 * unit, left), ylim=(1.05 * shapes["embed.weight"][0], -0.3 * unit), aspect="equal")
    axes.axis("off")
    axes.legend(loc="lower right", ncols=len(ranks), fontsize=10, frameon=False)
    return picture


def _parts(axes, boxes, shape, left, width):
    """The parts of one parameter, a colour a rank; grey where each rank has the whole."""
    for r, (box, colour) in enumerate(zip(boxes, draw.COLOURS)):
        (top, bottom), (begin, end) = box if len(box) == 2 else (*box, (0, width))
        whole = [stop - start for start, stop in box] == list(shape)
        axes.add_patch(Rectangle((left + begin, top), end - begin, bottom - top, edgecolor="white",
                                 facecolor="#d0d0d0" if whole else colour, linewidth=0.8))


def kept_bars(rows: dict[str, tuple[Sequence[torch.Tensor], float]], title: str,
              names: Sequence[str] = GPT2) -> draw.Picture:
    """{row: (the tensors that autograd keeps, on the meta device too, bytes predicted)}, by place in a layer."""
    picture, axes = draw.canvas(8.8, 1.3 + 0.55 * len(rows), title)
    whole = max(sum(tensor.nbytes for tensor in tensors) for tensors, _ in rows.values())
    for y, (tensors, predicted) in enumerate(rows.values()):
        left, kinds = 0, dict.fromkeys(KEPT, 0)
        for name, tensor in zip(names, tensors, strict=True):
            kinds[next(kind for kind, starts in KEPT.items() if name.startswith(starts))] += tensor.nbytes
        for colour, (kind, size) in zip((draw.GREEN, draw.ORANGE, draw.BLUE), kinds.items()):
            axes.barh(y, size / 1e3, 0.62, left / 1e3, color=colour, edgecolor="white", label="" if y else kind)
            left += size
        axes.plot([predicted / 1e3] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2,
                  label="" if y else "predicted")
        axes.text(left / 1e3, y, f"  {left / whole:.0%}", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="kB a layer, counted", xlim=(0, 1.1 * whole / 1e3))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def cliff(lines: dict[str, tuple], points: dict[str, tuple], title: str) -> draw.Picture:
    """Speed of each rank in %, over ranks of tensor parallelism by ranks of a node: {label: (xs, ys)}.

    Predicted are `lines`, measured or published `points`; labels in both share a colour. Nodes end at 1.
    """
    picture, axes = draw.canvas(8.8, 4.6, title)
    colours = dict(zip(dict.fromkeys([*points, *lines]), (draw.BLUE, draw.GREY, draw.GREEN, draw.RED)))
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, color=colours[label], linewidth=1.6, zorder=2,
                  linestyle="-" if label in points else (0, (3, 3)), label=f"{label}: two wires, predicted")
    for (label, (xs, ys)), mark in zip(points.items(), "oD"):
        axes.plot(xs, ys, mark, color=colours[label], markeredgecolor="white", markersize=9, label=label, zorder=3)
        for x, y in zip(xs, ys):
            axes.annotate(f"{y:.0f}", (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=9,
                          color=colours[label])
    axes.axvline(1, color=draw.RED, linewidth=1.2, linestyle=":", zorder=1)
    axes.text(1.03, 4, "the node ends", color=draw.RED, fontsize=10)
    axes.set_xscale("log", base=2)
    ticks = sorted({x for xs, _ in points.values() for x in xs})
    axes.set_xticks(ticks, [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel="ranks of tensor parallelism, in nodes", ylabel="speed of a rank, %", ylim=(0, 118))
    axes.legend(loc="lower left", fontsize=10, frameon=False)
    return picture
