"""Causal grouped-query attention of one layer: projections, norms and rotation around an attention core.

Vaswani et al. 2017; GQA (Ainslie et al. 2023): H/KV query heads share one key/value head. Two attributes can
be replaced from outside: `core`, any exact attention (attention_cores.py), and the ports of the linears
(ports.py). A KV cache, given in the call's context, takes the core's place.
B sequences, T tokens, C width, H query heads, KV key heads, K head_dim.
"""
from typing import NamedTuple

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.attention_cores import ATTENTION_CORES
from nanoinfra.model.attention_mask import AttentionMask, alibi_slopes
from nanoinfra.model.layers import RMSNorm
from nanoinfra.model.ports import PlainInPort, PlainOutPort
from nanoinfra.model.rope import apply_rotary_emb


class ForwardContext(NamedTuple):
    """What the blocks of a decoder are told in a forward besides their input."""
    rope: tuple[torch.Tensor, torch.Tensor] | None = None  # (cos, sin) at the tokens' positions
    document_ends: tuple[int, ...] | None = None  # of the documents packed into a row; None: one document
    cache: object = None                     # a KV cache: has attend(layer, q, k, v, mask)


NO_CONTEXT = ForwardContext()


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

    def forward(self, x: torch.Tensor, context: ForwardContext = NO_CONTEXT) -> torch.Tensor:
        """`x` (B, T, C) -> (B, T, C)."""
        q, k, v = map(self._heads, self.in_proj(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = apply_rotary_emb(q, context.rope), apply_rotary_emb(k, context.rope)
        y = self._attend(q, k, v, context)                                # (B, H, T, K)
        return self.out_proj(y.transpose(1, 2).flatten(2), self.o)        # (B, H, T, K) -> (B, T, C)

    def linears_by_port(self) -> dict[str, tuple[nn.Module, ...]]:
        """The linears that each port applies."""
        return {"in_proj": (self.q, self.k, self.v), "out_proj": (self.o,)}

    def _attend(self, q, k, v, context):
        if context.cache is not None:
            return context.cache.attend(self.layer, q, k, v, self.mask)
        if context.document_ends is None:
            return self.core(q, k, v, self.mask)
        return self.core(q, k, v, self.mask._replace(document_ends=context.document_ends))

    def _heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)       # (B, H or KV, T, K)
