"""Causal attention with grouped queries: softmax(q k^T / sqrt(K)) v, query t seeing keys 0..t.

Vaswani et al. 2017; GQA (Ainslie et al. 2023): H/KV query heads share one key/value head, so that a KV cache
holds 2 KV K numbers a token and layer. The core that does the sums is an attribute: `naive` writes the (T, S)
scores to memory, `sdpa` is torch's fused one; a KV cache, given as an argument, takes the core's place. So is
`read`, which makes q, k and v of the input.
B sequences, T query tokens, S key tokens, H query heads, KV key heads, G = H/KV, K head_dim.
"""
import math

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

    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        """`x` (B, T, C) -> (B, T, C). `rope` is (cos, sin) or None; a cache replaces the core."""
        q, k, v = map(self._heads, self.read(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = self.core(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))                       # (B, H, T, K) -> (B, T, C)

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, H or KV, T, K)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as written. `k`, `v` (B, KV, S, K); `q` (B, H, T, K) are the last T of the S tokens."""
    (T, K), (KV, S) = q.shape[2:], k.shape[1:3]
    q = q.unflatten(1, (KV, -1))                                          # (B, KV, G, T, K)
    scores = (q.flatten(2, 3) @ k.mT).view(*q.shape[:-1], S)              # (B, KV, G, T, S)
    scores = scores / math.sqrt(K)
    if T > 1:                                                             # a single query is the newest token
        scores = scores.masked_fill(future(T, S, q.device), -math.inf)
    weights = scores.softmax(dim=-1, dtype=wide(q.dtype)).to(q.dtype)     # (B, KV, G, T, S)
    y = weights.flatten(2, 3) @ v                                         # (B, KV, G*T, K)
    return y.view(q.shape).flatten(1, 2)                                  # (B, H, T, K)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same by torch's fused kernel, which never writes the scores to memory."""
    (H, T), (KV, S) = q.shape[1:3], k.shape[1:3]
    mask = None if T == S else ~future(T, S, q.device)  # torch's own mask aligns at the start
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=H != KV)


def future(T: int, S: int, device: torch.device) -> torch.Tensor:
    """True where query t, the (S - T + t)-th token, would see a later key: (T, S)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)


CORES = {"naive": naive, "sdpa": sdpa}
