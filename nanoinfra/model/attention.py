"""Causal grouped-query attention: softmax(q k^T / sqrt(K)) v, where query t sees keys 0..t.

Vaswani et al. 2017; GQA (Ainslie et al. 2023): H/KV query heads share one key/value head; ALiBi (Press et al.
2022): a score falls by its head's slope for each token of distance; sliding window (Jiang et al. 2023): a
query sees the last W tokens, itself included. Two attributes can be replaced from outside: the attention core
(naive or torch's sdpa; a KV cache argument takes its place) and the ports of the linears (ports.py).
B sequences, T query tokens, S key tokens, H query heads, KV key heads, G = H/KV, K head_dim.
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.layers import RMSNorm, at_least_float32
from nanoinfra.model.ports import PlainInPort, PlainOutPort
from nanoinfra.model.rope import apply_rotary_emb


class AttentionMask(NamedTuple):
    """The causal mask of a layer: its sliding window and its ALiBi slopes."""
    window: int | None = None                # tokens that a query sees, itself included; None: all before it
    alibi_slopes: tuple[float, ...] | None = None  # one for each query head; None: no ALiBi


CAUSAL_MASK = AttentionMask()


class Attention(nn.Module):
    """Self-attention of one layer. It counts heads from its projections, so a shard of them works too."""

    def __init__(self, config: ModelConfig, layer: int, attention: str = "sdpa"):
        super().__init__()
        if attention not in ATTENTION_CORES:
            raise ValueError(f"attention {attention!r} is not one of {', '.join(ATTENTION_CORES)}")
        C, H, KV, K, bias = config.width, config.heads, config.kv_heads, config.head_dim, config.has_bias
        self.q = nn.Linear(C, H * K, bias=bias("q"))
        self.k = nn.Linear(C, KV * K, bias=bias("k"))
        self.v = nn.Linear(C, KV * K, bias=bias("v"))
        self.o = nn.Linear(H * K, C, bias=bias("o"))
        self.q_norm = RMSNorm(K, config.eps) if config.architecture.qk_norm else None
        self.k_norm = RMSNorm(K, config.eps) if config.architecture.qk_norm else None
        self.layer, self.head_dim = layer, K
        self.core = ATTENTION_CORES[attention]
        self.in_proj = PlainInPort()
        self.out_proj = PlainOutPort()
        slopes = alibi_slopes(H) if config.architecture.position_encoding == "alibi" else None
        self.mask = AttentionMask(config.sliding_window_of_layer(layer), slopes)

    def forward(self, x: torch.Tensor, rope=None, cache=None) -> torch.Tensor:
        """`x` (B, T, C) -> (B, T, C). `rope` is (cos, sin) or None; a KV `cache` replaces the core."""
        q, k, v = map(self._heads, self.in_proj(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rotary_emb(q, rope), apply_rotary_emb(k, rope)
        core = self.core if cache is None else partial(cache.attend, self.layer)
        y = core(q, k, v, self.mask)
        return self.out_proj(y.transpose(1, 2).flatten(2), self.o)        # (B, H, T, K) -> (B, T, C)

    def linears_by_port(self) -> dict[str, tuple[nn.Module, ...]]:
        """The linears that each port applies."""
        return {"in_proj": (self.q, self.k, self.v), "out_proj": (self.o,)}

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, H or KV, T, K)


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
    """Attention as in the paper: the scores (T, S) are written to memory.

    `q` (B, H, T, K) are the last T of the S tokens of `k` and `v` (B, KV, S, K). ALiBi's slopes multiply the
    key's position instead of its distance from the query: within a row of scores the two differ by a
    constant, which softmax ignores.
    """
    (T, K), (KV, S) = q.shape[2:], k.shape[1:3]
    q = q.unflatten(1, (KV, -1))                                          # (B, KV, G, T, K)
    scores = (q.flatten(2, 3) @ k.mT).view(*q.shape[:-1], S)              # (B, KV, G, T, S)
    scores = scores / math.sqrt(K)
    if mask.alibi_slopes is not None:
        positions = torch.arange(1 - S, 1, device=q.device)               # (S,), 0 for the newest key
        scores = scores + _times(mask.alibi_slopes, positions, q).view(KV, -1, 1, S)  # float32 from here on
    if T > 1 or mask.window is not None:                                  # a single query is the newest token
        scores = scores.masked_fill(hidden_key_mask(T, S, q.device, mask.window), -math.inf)
    weights = scores.softmax(dim=-1, dtype=at_least_float32(q.dtype)).to(q.dtype)     # (B, KV, G, T, S)
    y = weights.flatten(2, 3) @ v                                         # (B, KV, G*T, K)
    return y.view(q.shape).flatten(1, 2)                                  # (B, H, T, K)


def sdpa_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
    """The same as `naive_attention` by torch's fused kernel, which does not write the scores to memory.

    It does read ALiBi's bias from memory, and a mask where a sliding window hides keys.
    """
    (H, T), (KV, S) = q.shape[1:3], k.shape[1:3]
    if mask.alibi_slopes is not None:
        return F.scaled_dot_product_attention(q, k, v, _bias(mask, T, S, q), enable_gqa=H != KV)
    plain = T == S and (mask.window is None or S <= mask.window)
    seen = None if plain else ~hidden_key_mask(T, S, q.device, mask.window)   # torch's aligns at the start
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=plain, enable_gqa=H != KV)


def hidden_key_mask(T: int, S: int, device: torch.device, window: int | None = None) -> torch.Tensor:
    """A mask (T, S), true where a key is hidden from query t: it is later, or before the query's window.

    Query t is the (S - T + t)-th token.
    """
    keys = torch.ones(T, S, dtype=torch.bool, device=device)
    later = keys.triu(S - T + 1)
    return later if window is None else later | keys.tril(S - T - window)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The ALiBi slope of each head: 2^(-8 h/n) for h = 1..n, where the number of heads n is a power of two.

    For another number, as in BLOOM: the slopes of the next smaller power of two, then every second slope of
    the next larger one.
    """
    n = 2 ** (heads.bit_length() - 1)
    ladder = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return (*ladder, *(2.0 ** (-4 * h / n) for h in range(1, 2 * (heads - n), 2)))


def _bias(mask, T, S, q):
    """ALiBi's bias (1, H, T, S), -inf for hidden keys. 16 bits are precise near 0, where it matters."""
    positions = torch.arange(S, device=q.device)
    distance = positions - positions[S - T:].unsqueeze(-1)                # (T, S), 0 or less
    hidden = hidden_key_mask(T, S, q.device, mask.window)
    bias = _times(mask.alibi_slopes, distance, q).masked_fill(hidden, -math.inf)
    return bias.to(q.dtype).unsqueeze(0)


def _times(slopes, x, q):
    """Each slope times `x`, in float32 at least: (H, *x)."""
    return torch.tensor(slopes, dtype=at_least_float32(q.dtype), device=q.device).view(-1, *[1] * x.dim()) * x


ATTENTION_CORES = {"naive": naive_attention, "sdpa": sdpa_attention}
