"""Cost of decoder calls over a student's KV cache: T new tokens of B sequences, which then have S tokens.

`count_flops_and_reads` works on shapes alone, `time_tokens_per_second` takes the time. `roofline` plots
FLOP/s over arithmetic intensity x (FLOPs a byte), below min(bandwidth x, peak). Williams et al. 2009.
"""
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import torch
from torch.utils.flop_counter import FlopCounterMode

from lessons.l15_kv_cache.exercise_cache import ExerciseKVCache
from nanoinfra.config import ModelConfig
from nanoinfra.formulas.inference_cost import arithmetic_intensity, inference_flops
from nanoinfra.lab import draw
from nanoinfra.lab.instruments.tensor_read_bytes import TensorReadBytes
from nanoinfra.lab.measure import Measurement, median_of_times, timed
from nanoinfra.model.attention_mask import CAUSAL_MASK, hidden_key_mask
from nanoinfra.model.decoder import Decoder


def measure_read_bandwidths(nbytes: int) -> dict[str, float]:
    """Measured B/s of reading a large tensor in three ways, the best of several runs each."""
    x, column = torch.ones(nbytes // 4096, 1024), torch.ones(1024)
    ways = {"sum": x.sum, "dot with itself": lambda: x.flatten() @ x.flatten(), "matrix times vector":
            lambda: x @ column}
    return {way: x.nbytes / _best(run) for way, run in ways.items()}


def measure_matmul_rate(n: int = 1024) -> float:
    """Measured FLOP/s of a product of n x n matrices, the best of several runs."""
    x = torch.randn(n, n)
    return 2 * n**3 / _best(lambda: x @ x)


def _best(run):
    return min(timed(run, 1).value for _ in range(7))


def count_flops_and_reads(config: ModelConfig, attend: Callable,
                          B: int, T: int, S: int) -> tuple[int, Counter]:
    """(FLOPs, {"weights", "cache": bytes read}) of a call, counted on the meta device."""
    with torch.device("meta"):
        model, cache = Decoder(config), ExerciseKVCache(attend, config, B, S)
        traffic = TensorReadBytes(weights=model.parameters(), cache=[cache.memory])
        with FlopCounterMode(display=False) as counter, traffic:
            _call(model, cache, B, T, S)
    return counter.get_total_flops(), traffic.read_bytes


def time_tokens_per_second(model: Decoder, attend: Callable, B: int, T: int, S: int,
                           repeats: int) -> Measurement:
    """Time `repeats` equal calls: tokens/s as a Measurement."""
    cache = ExerciseKVCache(attend, model.config, B, S)
    cache.memory.fill_(0.1)
    marks = [_call(model, cache, B, T, S) and time.perf_counter() for _ in range(1 + repeats)]
    return median_of_times([B * T / (end - begin) for begin, end in pairwise(marks)], "tokens/s")


@torch.no_grad()
def _call(model, cache, B, T, S):
    cache.length = S - T
    hidden = model.hidden_states(torch.zeros(B, T, dtype=torch.long), torch.arange(S - T, S), cache)
    model.head(hidden[:, -1]).argmax(-1)
    return True


def attention_mask_picture(calls: dict[str, tuple[int, int]], title: str) -> draw.Picture:
    """Draw the causal mask of each {name: (T, S)}: a row for each new token, a column for each key."""
    picture, axes = draw.new_figure(8.8, 1.9 + 0.23 * max(T for T, _ in calls.values()), title)
    kinds = {"key was kept": draw.SKY, "key is new": draw.BLUE, "key is later, not seen": "#e8e8e8"}
    left = 0
    for name, (T, S) in calls.items():
        hidden = hidden_key_mask(CAUSAL_MASK, T, S, torch.device("cpu")).tolist()
        for t in range(T):
            for s in range(S):
                kind = [*kinds][2 if hidden[t][s] else int(s >= S - T)]
                axes.barh(t, 1, 1, left + s, color=kinds[kind], edgecolor="white", linewidth=1.5)
        axes.text(left + S / 2, -0.8, f"{name}\nT = {T}, S = {S}", ha="center", va="bottom", fontsize=11)
        left += S + 2
    for kind, colour in kinds.items():
        axes.barh(0, 0, color=colour, label=kind)
    axes.set(xlim=(-0.5, left - 1.5), ylim=(max(T for T, _ in calls.values()) - 0.4, -2.4), aspect="equal")
    axes.axis("off")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=3, fontsize=10, frameon=False)
    return picture


def throughput_over_batch(lines: dict[str, tuple], dots: dict[str, tuple], even: float,
                          title: str) -> draw.Picture:
    """Plot tokens/s over the batch size: predicted ceilings, the last one dashed, and timed calls.

    A vertical line stands at `even`, the batch from which on the KV cache is larger than the weights.
    """
    *_, dashed = lines
    picture = draw.plot_curves(lines, dots, "sequences in the batch", "tokens/s", title,
                               dashed_labels=[dashed])
    return _beside(draw.draw_vertical_line(picture, even, f"MHA: cache = weights at {even:.3g}"))


def roofline(calls: dict[str, list[tuple]], dtype_bytes: int, bandwidth: float, peak: float,
             title: str) -> draw.Picture:
    """Roofline with a dot for each call of {label: [(config, B, T, S, tokens/s)]}, at most five labels."""
    dots = {label: [_place(call, dtype_bytes) for call in each] for label, each in calls.items()}
    edge, reach = peak / bandwidth, [x for each in dots.values() for x, _ in each]
    xs = [min(reach) / 2, edge, 2 * max(edge, *reach)]
    picture = draw.plot_curves({"the roof": (xs, [min(bandwidth * x, peak) / 1e9 for x in xs])},
                               {label: tuple(zip(*each)) for label, each in dots.items()},
                               "FLOPs for a byte read", "GFLOP/s", title)
    axes = picture.figure.axes[0]
    for i, (label, each) in enumerate(dots.items()):
        for (x, y), (_, B, *_) in zip(each, calls[label]):
            axes.annotate(str(B), (x, y), (-5, 6) if i % 2 else (5, -11), textcoords="offset points",
                          fontsize=9, ha="right" if i % 2 else "left", color=draw.SERIES_COLOURS[i + 1])
    return _beside(draw.draw_vertical_line(picture, edge, f"the edge: {edge:.0f} FLOPs a byte"))


def _beside(picture):
    """Put the legend at the right, and call lines ceilings."""
    axes = picture.figure.axes[0]
    for line in axes.get_lines():
        said = line.get_label()
        line.set_label(said.replace(", predicted", ": at most").replace(", measured", ", timed"))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10, frameon=False)
    return picture


def _place(call, dtype_bytes):
    config, B, T, S, tokens_per_s = call
    flops = inference_flops(config, B, T, S) / (B * T) * tokens_per_s
    return arithmetic_intensity(config, B, T, S, dtype_bytes), flops / 1e9
