"""Causal attention with grouped queries: softmax(q k^T / sqrt(K)) v, query t seeing keys 0..t.

Vaswani et al. 2017; GQA (Ainslie et al. 2023): H/KV query heads share one key/value head; ALiBi (Press et al.
2022): a score falls by its head's slope for each token of distance. The core that does the sums is an
attribute: `naive` writes the (T, S) scores to memory, `sdpa` is torch's fused one; a KV cache, given as an
argument, takes the core's place. So is `read`, which makes q, k and v of the input.
B sequences, T query tokens, S key tokens, H query heads, KV key heads, G = H/KV, K head_dim.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.layers import RMSNorm, apart, rotate, wide


class Attention(nn.Module):
    """Self-attention of one layer. Heads are counted from the projections, so slices of them work."""

    def __init__(self, config: ModelConfig, layer: int, attention: str = "sdpa"):
        super().__init__()
        if attention not in CORES:
            raise ValueError(f"attention {attention!r} is not one of {', '.join(CORES)}")
        C, H, KV, K, bias = config.width, config.heads, config.kv_heads, config.head_dim, config.parts.bias
        self.q = nn.Linear(C, H * K, bias=bias)
        self.k = nn.Linear(C, KV * K, bias=bias)
        self.v = nn.Linear(C, KV * K, bias=bias)
        self.o = nn.Linear(H * K, C, bias=bias)
        self.q_norm = RMSNorm(K, config.eps) if config.parts.qk_norm else None
        self.k_norm = RMSNorm(K, config.eps) if config.parts.qk_norm else None
        self.layer, self.head_dim = layer, K
        self.core, self.read = CORES[attention], apart
        self.slopes = alibi_slopes(H) if config.parts.position == "alibi" else None     # one a query head

    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        """`x` (B, T, C) -> (B, T, C). `rope` is (cos, sin) or None; a cache replaces the core."""
        q, k, v = map(self._heads, self.read(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        core = self.core if cache is None else partial(cache.attend, self.layer)
        y = core(q, k, v, self.slopes)
        return self.o(y.transpose(1, 2).flatten(2))                       # (B, H, T, K) -> (B, T, C)

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, H or KV, T, K)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
          slopes: tuple[float, ...] | None = None) -> torch.Tensor:
    """Attention as written. `k`, `v` (B, KV, S, K); `q` (B, H, T, K) are the last T of the S tokens.

    `slopes` are ALiBi's, one for each of the H heads. They multiply the key's place instead of its distance
    from the query: within a row of scores the two differ by a constant, for which softmax does not care.
    """
    (T, K), (KV, S) = q.shape[2:], k.shape[1:3]
    q = q.unflatten(1, (KV, -1))                                          # (B, KV, G, T, K)
    scores = (q.flatten(2, 3) @ k.mT).view(*q.shape[:-1], S)              # (B, KV, G, T, S)
    scores = scores / math.sqrt(K)
    if slopes is not None:
        places = torch.arange(1 - S, 1, device=q.device)                  # (S,), the newest key's is 0
        scores = scores + _times(slopes, places, q).view(KV, -1, 1, S)    # wide from here on
    if T > 1:                                                             # a single query is the newest token
        scores = scores.masked_fill(future(T, S, q.device), -math.inf)
    weights = scores.softmax(dim=-1, dtype=wide(q.dtype)).to(q.dtype)     # (B, KV, G, T, S)
    y = weights.flatten(2, 3) @ v                                         # (B, KV, G*T, K)
    return y.view(q.shape).flatten(1, 2)                                  # (B, H, T, K)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
         slopes: tuple[float, ...] | None = None) -> torch.Tensor:
    """The same by torch's fused kernel, which never writes the scores to memory (but reads ALiBi's bias)."""
    (H, T), (KV, S) = q.shape[1:3], k.shape[1:3]
    if slopes is not None:
        return F.scaled_dot_product_attention(q, k, v, _bias(slopes, T, S, q), enable_gqa=H != KV)
    mask = None if T == S else ~future(T, S, q.device)  # torch's own mask aligns at the start
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=H != KV)


def future(T: int, S: int, device: torch.device) -> torch.Tensor:
    """True where query t, the (S - T + t)-th token, would see a later key: (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8 h/n) for h = 1..n, where n, the number of heads, is a power of two.

    For others, as BLOOM has it: the slopes of the power of two below, then every second one of the next.
    """
    n = 2 ** (heads.bit_length() - 1)
    ladder = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return (*ladder, *(2.0 ** (-4 * h / n) for h in range(1, 2 * (heads - n), 2)))


def _bias(slopes, T, S, q):
    """ALiBi's bias with the causal mask: (1, H, T, S). 16 bits hold it well near 0, where it counts."""
    places = torch.arange(S, device=q.device)
    distance = places - places[S - T:].unsqueeze(-1)                      # (T, S), 0 or less
    bias = _times(slopes, distance, q).masked_fill(future(T, S, q.device), -math.inf)
    return bias.to(q.dtype).unsqueeze(0)


def _times(slopes, places, q):
    """Each slope times all `places`, wide: (H, *places)."""
    return torch.tensor(slopes, dtype=wide(q.dtype), device=q.device).view(-1, *[1] * places.dim()) * places


CORES = {"naive": naive, "sdpa": sdpa}
