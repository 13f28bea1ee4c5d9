"""Exact attention, softmax(q k^T / sqrt(K)) v, behind one interface: with log-sum-exp and explicit backward.

    lse = log sum exp(scores)     P = exp(scores - lse)     y = P v
    dP = dy v^T     dS = P (dP - sum(dy y))     dq = dS k     dk = dS^T q     dv = P^T dy
Outputs over parts of the keys merge by their log-sum-exp, and a part's gradients need only the whole's y and
lse (FlashAttention, Dao et al. 2022): this is what ring, chunked and flash attention build on. A plain
differentiable function (q, k, v, mask) -> y is a core too, but yields no log-sum-exp. GQA (Ainslie et al.
2023): G = H/KV query heads share a key/value head. B sequences, T queries, S keys, H, KV heads, K head_dim.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from nanoinfra.model.attention_mask import (
    CAUSAL_MASK,
    AttentionMask,
    additive_mask,
    alibi_bias,
    every_query_sees_itself,
    hidden_key_mask,
    mask_kind,
    split_by_document,
)
from nanoinfra.model.layers import at_least_float32


class AttentionCore:
    """The base of exact attention: a technique implements `forward` and `backward`.

    `q` is (B, H, T, K), `k` and `v` are (B, KV, S, K). Both methods run without grad; a call of the core is
    differentiable.
    """

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend: (`y` (B, H, T, K), `lse` (B, H, T) in at least float32).

        The log-sum-exp is that of a query's scores. Where a query sees nothing, y is 0 and lse -inf.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(q, k, v, mask) -> (y, lse)")

    def backward(self, dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                 lse: torch.Tensor, mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients (dq, dk, dv), from that of y. `y` and `lse` may be of more keys than `k` holds."""
        raise _missing_backward(self)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
        """Attend, differentiably: `y` (B, H, T, K). Autograd keeps q, k, v, lse and y, and no scores."""
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return _forward(self, q, k, v, mask)[0]
        if type(self).backward is AttentionCore.backward:
            raise _missing_backward(self)
        return _DifferentiableCore.apply(self, mask, q, k, v)


def _missing_backward(core):
    return NotImplementedError(f"{type(core).__name__} has no backward(dy, q, k, v, y, lse, mask) -> (dq, "
                               f"dk, dv), so it cannot train; write one, or call it under torch.no_grad()")


class _DifferentiableCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, core, mask, q, k, v):
        y, lse = _forward(core, q, k, v, mask)
        ctx.core, ctx.mask = core, mask
        ctx.save_for_backward(q, k, v, lse, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, lse, y = ctx.saved_tensors
        return None, None, *ctx.core.backward(dy, q, k, v, y, lse, ctx.mask)


def _forward(core, q, k, v, mask):
    found = core.forward(q, k, v, mask)
    if not (isinstance(found, tuple) and len(found) == 2 and found[1].shape == q.shape[:3]):
        raise TypeError(f"{type(core).__name__}.forward must return (y, lse), a log-sum-exp of shape "
                        f"{list(q.shape[:3])} beside the output")
    return found


def require_log_sum_exp(core: AttentionCore | Callable) -> AttentionCore:
    """Return `core`, for a wrapper that merges outputs by their log-sum-exp.

    Raises TypeError for a plain function, such as `naive_attention`, which yields none.
    """
    if not isinstance(core, AttentionCore):
        name = getattr(core, "__name__", type(core).__name__)
        raise TypeError(f"{name} is a plain function: it yields no log-sum-exp to merge outputs by; give an "
                        f"AttentionCore, such as NaiveCore() or sdpa_attention")
    return core


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                    mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
    """Attention as in the paper (Vaswani et al. 2017): the scores (T, S) are written to memory.

    `q` (B, H, T, K), by default the last T of the S tokens of `k` and `v` (B, KV, S, K). Autograd keeps the
    mask and the softmax. With a causal mask, ALiBi's slopes multiply the key's position instead of its
    distance from the query: within a row of scores the two differ by a constant, which softmax ignores.
    """
    T, (KV, S) = q.shape[2], k.shape[1:3]
    scores = _scores(q, k)                                                # (B, KV, G, T, S)
    if mask.alibi_slopes is not None:
        newest = mask._replace(first_positions=(S - 1, 0)) if mask.causal else mask
        bias = alibi_bias(newest, 1 if mask.causal else T, S, at_least_float32(q.dtype), q.device)
        scores = scores + bias.view(KV, -1, *bias.shape[1:])              # float32 from here on
    if mask_kind(mask, T, S) != "all":
        scores = scores.masked_fill(hidden_key_mask(mask, T, S, q.device), -math.inf)
    weights = scores.softmax(dim=-1, dtype=at_least_float32(q.dtype)).to(q.dtype)     # (B, KV, G, T, S)
    if not every_query_sees_itself(mask, T, S):
        weights = weights.masked_fill(hidden_key_mask(mask, T, S, q.device).all(-1, keepdim=True), 0.0)
    y = weights.flatten(2, 3) @ v                                         # (B, KV, G*T, K)
    return y.view(*weights.shape[:-1], -1).flatten(1, 2)                  # (B, H, T, K)


class NaiveCore(AttentionCore):
    """The formulas above, in at least float32, with all scores in memory: the oracle of the other cores."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor]:
        """See AttentionCore.forward."""
        scores = self._masked_scores(q, k, mask)                          # (B, KV, G, T, S)
        lse = scores.logsumexp(-1)                                        # (B, KV, G, T)
        P = (scores - _finite(lse).unsqueeze(-1)).exp()
        y = torch.einsum("bkgts,bksd->bkgtd", P, v.to(P.dtype))
        return y.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(self, dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                 lse: torch.Tensor, mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See AttentionCore.backward."""
        scores, KV = self._masked_scores(q, k, mask), k.shape[1]
        P = (scores - _finite(lse).unflatten(1, (KV, -1)).unsqueeze(-1)).exp()            # (B, KV, G, T, S)
        dy, y, grouped = (x.to(P.dtype).unflatten(1, (KV, -1)) for x in (dy, y, q))       # (B, KV, G, T, K)
        dP = torch.einsum("bkgtd,bksd->bkgts", dy, v.to(P.dtype))
        dS = P * (dP - (dy * y).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
        dq = torch.einsum("bkgts,bksd->bkgtd", dS, k.to(P.dtype)).flatten(1, 2)
        dk = torch.einsum("bkgts,bkgtd->bksd", dS, grouped)
        dv = torch.einsum("bkgts,bkgtd->bksd", P, dy)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _masked_scores(self, q, k, mask):
        wide, (T, S), KV = at_least_float32(q.dtype), (q.shape[2], k.shape[2]), k.shape[1]
        scores = _scores(q.to(wide), k.to(wide))                          # (B, KV, G, T, S)
        added = additive_mask(mask, T, S, wide, q.device)                 # (T, S) or (1, H, T, S)
        return scores + (added if added.dim() == 2 else added.unflatten(1, (KV, -1)))


class FlashKernels(NamedTuple):
    """torch's fused attention for the CPU, which F.scaled_dot_product_attention calls too. It is private."""
    forward: Callable
    backward: Callable


def find_cpu_flash_kernels() -> FlashKernels | None:
    """The kernels of this torch, or None where it has them under no such name."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    pair = [getattr(torch.ops.aten, name + suffix, None) for suffix in ("", "_backward")]
    return FlashKernels(*(packet.default for packet in pair)) if all(pair) else None


CPU_FLASH_KERNELS = find_cpu_flash_kernels()


class SdpaCore(NaiveCore):
    """torch's fused attention: no scores in memory, and each packed document by itself.

    A tensor (T, S) is made only for a mask that is neither the plain diagonal nor everything, in forward and
    again in backward. On other devices than a CPU, F.scaled_dot_product_attention under plain autograd takes
    a call, and the naive formulas take `forward` and `backward`, because torch yields no log-sum-exp there.
    """

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
        """See AttentionCore."""
        T, S = q.shape[2], k.shape[2]
        if _has_kernel_for(q, v) or not every_query_sees_itself(mask, T, S):
            return super().__call__(q, k, v, mask)
        is_causal, added = _causal_flag_and_mask(q, k, mask, mask_kind(mask, T, S))
        added = None if added is None else added.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, added, is_causal=is_causal,
                                              enable_gqa=q.shape[1] != k.shape[1])

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor]:
        """See AttentionCore.forward."""
        if not _has_kernel_for(q, v):
            return super().forward(q, k, v, mask)
        if mask.document_ends is None:
            return _flash_forward(q, k, v, mask)
        y = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=at_least_float32(q.dtype))
        for rows, keys, part in split_by_document(mask, q.shape[2], k.shape[2]):
            y[:, :, rows], lse[:, :, rows] = _flash_forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], part)
        return y, lse

    def backward(self, dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor,
                 lse: torch.Tensor, mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See AttentionCore.backward."""
        if not _has_kernel_for(q, v):
            return super().backward(dy, q, k, v, y, lse, mask)
        if mask.document_ends is None:
            return _flash_backward(dy, q, k, v, y, lse, mask)
        dq, dk, dv = map(torch.zeros_like, (q, k, v))
        for rows, keys, part in split_by_document(mask, q.shape[2], k.shape[2]):
            dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = _flash_backward(
                dy[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], y[:, :, rows], lse[:, :, rows],
                part)
        return dq, dk, dv


def _has_kernel_for(q, v):
    return CPU_FLASH_KERNELS is not None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _flash_forward(q, k, v, mask):
    """One call of torch's kernel, for a mask without documents."""
    T, S = q.shape[2], k.shape[2]
    kind = mask_kind(mask, T, S)
    if kind == "none":
        return torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=at_least_float32(q.dtype))
    is_causal, added = _causal_flag_and_mask(q, k, mask, kind)
    y, lse = CPU_FLASH_KERNELS.forward(*map(_dense_rows, (q, k, v)), 0.0, is_causal, attn_mask=added)
    if kind == "mixed" and not every_query_sees_itself(mask, T, S):       # torch gives 0 to what sees nothing
        lse = lse.masked_fill(hidden_key_mask(mask, T, S, q.device).all(-1), -math.inf)
    return y, lse


def _flash_backward(dy, q, k, v, y, lse, mask):
    kind = mask_kind(mask, q.shape[2], k.shape[2])
    if kind == "none":
        return tuple(map(torch.zeros_like, (q, k, v)))
    is_causal, added = _causal_flag_and_mask(q, k, mask, kind)
    lse = _finite(lse) if kind == "mixed" else lse
    return CPU_FLASH_KERNELS.backward(*map(_dense_rows, (dy, q, k, v, y)), lse, 0.0, is_causal,
                                      attn_mask=added)


def _causal_flag_and_mask(q, k, mask, kind):
    """What torch is told of a mask: (is it the plain diagonal, what to add to the scores or None)."""
    if kind != "mixed" and mask.alibi_slopes is None:
        return kind == "diagonal", None
    return False, additive_mask(mask, q.shape[2], k.shape[2], at_least_float32(q.dtype), q.device)


def _dense_rows(x):
    """torch's kernel reads each row of K numbers as one piece of memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _finite(lse):
    """The log-sum-exp of what sees nothing, -inf, as a number: exp(-inf - 0) is 0."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _scores(q, k):
    """q k^T / sqrt(K) (B, KV, G, T, S) of `q` (B, H, T, K) and `k` (B, KV, S, K)."""
    grouped = q.unflatten(1, (k.shape[1], -1))                            # (B, KV, G, T, K)
    return (grouped.flatten(2, 3) @ k.mT).view(*grouped.shape[:-1], -1) / math.sqrt(q.shape[-1])


sdpa_attention = SdpaCore()
ATTENTION_CORES = {"naive": naive_attention, "sdpa": sdpa_attention}
