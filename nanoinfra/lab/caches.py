"""A KV cache around a student's `attend`, and a picture of who sees whom in a call.

    cache = Cache(attend, config, batch=1, capacity=64)
    model.hidden_states(tokens, places, cache)
    cache.length += tokens.shape[1]
"""
import math

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.lab import draw
from nanoinfra.model.attention import hidden_key_mask


class Cache:
    """Memory for all layers' keys and values, (L, 2, B, KV, capacity, K); `length` tokens of it are there.

    What no token has written is not a number. The caller adds to `length` once all layers have run.
    """

    def __init__(self, attend, config: ModelConfig, batch: int, capacity: int, dtype=torch.float32):
        L, KV, K = config.layers, config.kv_heads, config.head_dim
        self.core, self.length = attend, 0
        self.memory = torch.full((L, 2, batch, KV, capacity, K), math.nan, dtype=dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None):
        """What a decoder calls; `mask`, ALiBi's slopes or a window, is left out."""
        return self.core(self.memory[layer], self.length, q, k, v)


def seen(calls: dict[str, tuple[int, int]], title: str) -> draw.Picture:
    """{name: (T, S)}: a row for each of T new tokens, a column for each of S keys, side by side."""
    picture, axes = draw.canvas(8.8, 1.9 + 0.23 * max(T for T, _ in calls.values()), title)
    kinds = {"key was kept": draw.SKY, "key is new": draw.BLUE, "key is later, not seen": "#e8e8e8"}
    left = 0
    for name, (T, S) in calls.items():
        hidden = hidden_key_mask(T, S, torch.device("cpu")).tolist()
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
