"""Causal attention with grouped queries: softmax(q k^T / sqrt(K)) v, query t seeing keys 0..t.

Vaswani et al. 2017; GQA (Ainslie et al. 2023): H/KV query heads share one key/value head; ALiBi (Press et al.
2022): a score falls by its head's slope for each token of distance; sliding window (Jiang et al. 2023): a
query sees the last W tokens, itself included. The core that does the sums is an attribute: `naive` writes
the (T, S) scores to memory, `sdpa` is torch's fused one; a KV cache, given as an argument, takes the core's
place. So is `read`, which makes q, k and v of the input.
B sequences, T query tokens, S key tokens, H query heads, KV key heads, G = H/KV, K head_dim.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.layers import RMSNorm, apart, wide
from nanoinfra.model.rope import rotate


class Mask(NamedTuple):
    """What a query sees of the keys up to its own, and how."""
    window: int | None = None                # the last so many tokens, itself included; None: all
    slopes: tuple[float, ...] | None = None  # ALiBi's, one for each query head


CAUSAL = Mask()


class Attention(nn.Module):
    """Self-attention of one layer. Heads are counted from the projections, so slices of them work."""

    def __init__(self, config: ModelConfig, layer: int, attention: str = "sdpa"):
        super().__init__()
        if attention not in CORES:
            raise ValueError(f"attention {attention!r} is not one of {', '.join(CORES)}")
        C, H, KV, K, bias = config.width, config.heads, config.kv_heads, config.head_dim, config.has_bias
        self.q = nn.Linear(C, H * K, bias=bias("q"))
        self.k = nn.Linear(C, KV * K, bias=bias("k"))
        self.v = nn.Linear(C, KV * K, bias=bias("v"))
        self.o = nn.Linear(H * K, C, bias=bias("o"))
        self.q_norm = RMSNorm(K, config.eps) if config.parts.qk_norm else None
        self.k_norm = RMSNorm(K, config.eps) if config.parts.qk_norm else None
        self.layer, self.head_dim = layer, K
        self.core, self.read = CORES[attention], apart
        slopes = alibi_slopes(H) if config.parts.position == "alibi" else None
        self.mask = Mask(config.window_of(layer), slopes)

    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        """`x` (B, T, C) -> (B, T, C). `rope` is (cos, sin) or None; a cache replaces the core."""
        q, k, v = map(self._heads, self.read(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        core = self.core if cache is None else partial(cache.attend, self.layer)
        y = core(q, k, v, self.mask)
        return self.o(y.transpose(1, 2).flatten(2))                       # (B, H, T, K) -> (B, T, C)

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, H or KV, T, K)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = CAUSAL) -> torch.Tensor:
    """Attention as written. `k`, `v` (B, KV, S, K); `q` (B, H, T, K) are the last T of the S tokens.

    ALiBi's slopes multiply the key's place instead of its distance from the query: within a row of scores the
    two differ by a constant, for which softmax does not care.
    """
    (T, K), (KV, S) = q.shape[2:], k.shape[1:3]
    q = q.unflatten(1, (KV, -1))                                          # (B, KV, G, T, K)
    scores = (q.flatten(2, 3) @ k.mT).view(*q.shape[:-1], S)              # (B, KV, G, T, S)
    scores = scores / math.sqrt(K)
    if mask.slopes is not None:
        places = torch.arange(1 - S, 1, device=q.device)                  # (S,), the newest key's is 0
        scores = scores + _times(mask.slopes, places, q).view(KV, -1, 1, S)     # wide from here on
    if T > 1 or mask.window is not None:                                  # a single query is the newest token
        scores = scores.masked_fill(hidden_keys(T, S, q.device, mask.window), -math.inf)
    weights = scores.softmax(dim=-1, dtype=wide(q.dtype)).to(q.dtype)     # (B, KV, G, T, S)
    y = weights.flatten(2, 3) @ v                                         # (B, KV, G*T, K)
    return y.view(q.shape).flatten(1, 2)                                  # (B, H, T, K)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = CAUSAL) -> torch.Tensor:
    """The same by torch's fused kernel, which never writes the scores to memory.

    (But it reads ALiBi's bias, and a mask where there is a window that hides something.)
    """
    (H, T), (KV, S) = q.shape[1:3], k.shape[1:3]
    if mask.slopes is not None:
        return F.scaled_dot_product_attention(q, k, v, _bias(mask, T, S, q), enable_gqa=H != KV)
    plain = T == S and (mask.window is None or S <= mask.window)
    seen = None if plain else ~hidden_keys(T, S, q.device, mask.window)   # torch's own aligns at the start
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=plain, enable_gqa=H != KV)


def hidden_keys(T: int, S: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """(T, S), true where query t, the (S - T + t)-th token, sees no key: later, or before its window."""
    keys = torch.ones(T, S, dtype=torch.bool, device=device)
    later = keys.triu(S - T + 1)
    return later if window is None else later | keys.tril(S - T - window)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 h/n) for h = 1..n, where n, the number of heads, is a power of two.

    For others, as BLOOM has it: the slopes of the power of two below, then every second one of the next.
    """
    n = 2 ** (heads.bit_length() - 1)
    ladder = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return (*ladder, *(2.0 ** (-4 * h / n) for h in range(1, 2 * (heads - n), 2)))


def _bias(mask, T, S, q):
    """ALiBi's bias with what is hidden: (1, H, T, S). 16 bits hold it well near 0, where it counts."""
    places = torch.arange(S, device=q.device)
    distance = places - places[S - T:].unsqueeze(-1)                      # (T, S), 0 or less
    bias = _times(mask.slopes, distance, q).masked_fill(hidden_keys(T, S, q.device, mask.window), -math.inf)
    return bias.to(q.dtype).unsqueeze(0)


def _times(slopes, places, q):
    """Each slope times all `places`, wide: (H, *places)."""
    return torch.tensor(slopes, dtype=wide(q.dtype), device=q.device).view(-1, *[1] * places.dim()) * places


CORES = {"naive": naive, "sdpa": sdpa}
