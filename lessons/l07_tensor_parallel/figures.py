"""Runs and figures of tensor parallelism: what tp ranks send, which activations they save, how long they
wait.

`run_tensor_parallel_step` and `time_emulated_layers` run inside each rank. The figures show which rank holds
which part of each parameter, the bytes saved for backward, and a rank's speed over the tp size.
"""
import math
import time
from collections.abc import Callable, Sequence

import torch
from matplotlib.patches import Rectangle

from nanoinfra.config import ModelConfig
from nanoinfra.distributed import comm
from nanoinfra.distributed.comm_log import CommRecord
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.lab import draw
from nanoinfra.lab.instruments.emulated_compute import emulate_compute_time
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.model.attention import ForwardContext
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy

_MODULES_IN_ORDER = ("embed", "g", "positions", "norm1", "f", "q", "k", "v", "softmax", "o", "g", "o.bias",
                     "norm2", "f",
                     # in the order tokens meet them
                     "up", "GELU", "down", "g", "down.bias", "norm", "f", "head")
_KINDS_OF_SAVED_TENSORS = {"the norms": "norm", "what q, k, v and up read": "read", "between f and g": ""}
GPT2_SAVED_TENSORS = ("norm1 x", "norm1 mean", "norm1 std", "read by q, k, v", "q", "k", "v", "log-sum-exp",
                      "o's input",
                      # with sdpa, as they come
                      "norm2 x", "norm2 mean", "norm2 std", "read by up", "up", "GELU")


def run_tensor_parallel_step(config: ModelConfig, t: int, sp: str, batch: int,
                             seq: int) -> tuple[float, list[CommRecord], list[int]]:
    """Run a step on each of t ranks: (loss, records, bytes of each tensor that layer 0 saves)."""
    mesh, model = Mesh(tp=t, pp=world_size() // t), init_weights(Decoder(config), seed=0)
    cut = TensorParallel(model, mesh, sp)
    x, y = torch.randint(config.vocab, (2, batch, seq), generator=torch.Generator().manual_seed(0))
    mesh.comm_log.take_records()  # the weights, from rank 0
    loss = VocabParallelCrossEntropy(model.head)(model.hidden_states(x), y).mean()
    loss.backward()
    cut.all_reduce_partial_grads({name: p.grad for name, p in model.named_parameters()})
    rows, places = mesh.comm_log.take_records(), model.default_positions(x)
    stream = model.embed_tokens(x, places).detach().requires_grad_()
    rope = model.rope_cos_sin(places, stream.dtype)
    with SavedActivations(model.parameters()) as kept:
        out = model.blocks[0](stream, ForwardContext(rope))
        sizes = [tensor.untyped_storage().nbytes() for tensor in kept.saved_tensors()]
    assert out.requires_grad                                                 # and is alive, with all it keeps
    return loss.item(), rows, sizes


def time_emulated_layers(config: ModelConfig, t: int, wire: tuple[float, float], seconds: float, batch: int,
                         seq: int, repeats: int) -> list[float]:
    """Time all layers on each of t ranks: [seconds of forward and backward in each repeat].

    A layer sleeps for `seconds` / t, as long as an accelerator would compute, and the tp link is emulated.
    """
    mesh, model, trials = Mesh(tp=t, pp=world_size() // t, emulated_links={"tp": wire}), Decoder(config), []
    TensorParallel(model, mesh)
    emulate_compute_time(model.blocks, seconds / 1.5 / batch / t)  # of backward, a sequence
    for _ in range(repeats):
        stream = torch.ones(batch, seq, config.width, requires_grad=True)
        comm.barrier(mesh.tp)
        begin = time.monotonic()
        for block in model.blocks:
            stream = block(stream)
        stream.sum().backward()
        trials.append(time.monotonic() - begin)
    return trials


def parameter_shard_map(ranks: Sequence[dict[str, TensorShard]], shapes: dict[str, tuple[int, ...]],
                        title: str = "parts of ends and first layer by rank (grey: on all)") -> draw.Picture:
    """Draw which rank holds which part of a GPT-2's ends and first layer: outputs down, inputs across.

    `ranks[r]` is rank r's {parameter: its shard}, `shapes` those of the whole parameters. A tied head is the
    embedding.
    """
    picture, axes = draw.new_figure(9.4, 3.6, title)
    unit, left = shapes["blocks.0.norm1.weight"][0], 0.0
    names = {"head": "embed.weight"} | {name.split(".")[-2]: name for name in reversed(shapes)
                                        if name.endswith("weight")}
    for item in _MODULES_IN_ORDER:
        module, _, bias = item.partition(".")
        if module not in names:
            size, colour = (14, draw.BLUE) if len(item) == 1 else (9, "#666666")
            axes.text(left + 0.3 * unit, 0.5 * unit, item, ha="center", va="center", fontsize=size,
                      color=colour, rotation=90 * (len(item) > 1))
            left += 0.7 * unit
            continue
        begin, name = left, names[module]
        for each in _drawn(name, bias, shapes):
            left = _parts(axes, [shards[each] for shards in ranks], left, 0.12 * unit)
        small = {"fontsize": 9, "rotation": 90} if bias or len(shapes[name]) == 1 else {"fontsize": 10}
        text = "bias" if bias else item
        axes.text((begin + left) / 2, shapes[name][0] + 0.12 * unit, text, ha="center", va="top", **small)
        left += (0.12 + 0.2 * (item == "positions")) * unit                  # its name is wider than it
    for r in range(len(ranks)):
        axes.bar(0, 0, color=draw.SERIES_COLOURS[r], label=f"rank {r}")
    axes.set(xlim=(-0.1 * unit, left), ylim=(1.1 * shapes["embed.weight"][0], -0.2 * unit), aspect="equal")
    axes.axis("off")
    axes.legend(loc="lower left", bbox_to_anchor=(0.08, 0.1), ncols=len(ranks), fontsize=10, frameon=False)
    return picture


def _drawn(name, bias, shapes):
    """The parameters to draw at once: after g a row-parallel bias alone, of others matrix and bias."""
    beside = name.replace("weight", "bias")
    if bias:
        return [beside] if beside in shapes else []
    late = name.endswith(("attn.o.weight", "mlp.down.weight")) or len(shapes[name]) == 1
    return [name] if late or beside not in shapes else [name, beside]


def _parts(axes, shards, left, thin):
    """The parts of one parameter, grey where each rank has all of it. Returns the next free place."""
    _, width, *_ = *shards[0].full_shape, thin
    for shard, colour in zip(shards, draw.SERIES_COLOURS):
        (top, bottom), (begin, end), *_ = *shard.ranges, (0, width)
        whole = shard.size == shard.full_shape
        axes.add_patch(Rectangle((left + begin, top), end - begin, bottom - top, edgecolor="white",
                                 facecolor="#d0d0d0" if whole else colour, linewidth=0.8))
    return left + width + thin / 2


def saved_byte_bars(rows: dict[str, tuple[Sequence[int], float]], title: str,
                    names: Sequence[str] = GPT2_SAVED_TENSORS) -> draw.Picture:
    """Bars of {row: (bytes of each tensor that a layer saves, in the order of `names`; predicted bytes)}."""
    picture, axes = draw.new_figure(8.8, 1.3 + 0.55 * len(rows), title)
    whole = max(sum(sizes) for sizes, _ in rows.values())
    for y, (sizes, predicted) in enumerate(rows.values()):
        kinds, left = dict.fromkeys(_KINDS_OF_SAVED_TENSORS, 0), 0
        for name, size in zip(names, sizes, strict=True):
            kinds[_kind_of_saved_tensor(name)] += size
        for colour, (kind, size) in zip((draw.GREEN, draw.ORANGE, draw.BLUE), kinds.items()):
            axes.barh(y, size / 1e3, 0.62, left / 1e3, color=colour, label="" if y else kind)
            left += size
        axes.plot([predicted / 1e3] * 2, [y - 0.42, y + 0.42], color="black", label="" if y else "predicted")
        axes.text(left / 1e3, y, f"  {left / whole:.0%}", va="center", fontsize=10)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel="kB a layer, counted", xlim=(0, 1.1 * whole / 1e3))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def _kind_of_saved_tensor(name):
    return next(kind for kind, start in _KINDS_OF_SAVED_TENSORS.items() if name.startswith(start))


def speed_over_tp_size(rows: dict[str, tuple[int, dict[int, float], str, Callable]],
                       title: str) -> draw.Picture:
    """Plot the speed of a rank over the tp size, which is given in units of a node.

    {label: (ranks of a node, {t: speed in %, measured or published}, name of the line, t -> its speed)}.
    """
    picture, axes = draw.new_figure(8.8, 4.6, title)
    top = {}                                                                 # {x: the highest point there}
    for node, points, *_ in rows.values():
        top |= {t / node: max(y, top.get(t / node, 0)) for t, y in points.items()}
    for (label, (node, points, name, line)), colour, mark in zip(rows.items(), (draw.BLUE, draw.GREY), "oD"):
        t = [min(points) * 2**(i / 16) for i in range(200)]
        inside, beyond = [x for x in t if x <= node], [x for x in t if node < x <= 4.001 * node]
        t = [*inside, node, math.nan, 1.0001 * node, *beyond]               # a gap where the wire changes
        axes.plot([x / node for x in t], [line(x) for x in t], color=colour, linewidth=1.8,
                  label=f"{label}: {name}")
        axes.plot([x / node for x in points], points.values(), mark, color=colour, markeredgecolor="white",
                  markersize=9, label=f"{label}: timed", zorder=3)
        for x, y in points.items():
            above = y == top[x / node]
            axes.annotate(f"{y:.0f}", (x / node, y), (8, 6) if above else (-8, -14), color=colour, fontsize=9,
                          textcoords="offset points", ha="left" if above else "right")
    axes.axvline(1, color=draw.RED, linewidth=1.2, linestyle=":", zorder=1)
    axes.annotate("the node ends", (1, 0.03), (6, 0), xycoords=("data", "axes fraction"),
                  textcoords="offset points", color=draw.RED, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks([*top], [f"{x:g}" if x >= 1 else f"1/{1 / x:g}" for x in top])
    axes.minorticks_off()
    axes.set(xlabel="ranks that share a layer / ranks of a node", ylabel="speed of a rank, %", ylim=(0, 112))
    axes.legend(loc="lower left", fontsize=10, frameon=False)
    return picture
