"""The cost of inference: FLOPs and bytes of one forward call, and the roofline's limit in tokens a second.

A call computes T new tokens of each of B sequences, which then have S tokens: prefill has T = S, decode has
T = 1. It reads all weights and S cached tokens of each sequence: Psi d + B S (2 L KV K d) bytes, d bytes for
a weight or key; activations are left out. So tokens/s <= B T / max(bytes / bandwidth, FLOPs / peak FLOPs).
Pope et al. 2022, section 2; the roofline of Williams et al. 2009.
"""
from math import inf

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameters_by_part


def call_flops(config: ModelConfig, batch: int, new: int, total: int) -> int:
    """FLOPs of one forward call: `batch` sequences of `total_tokens`, of which `new_tokens` are computed.

    The head computes the last token of each sequence alone. By convention every query meets all
    `total_tokens` keys, as in flops.py.
    """
    forward = forward_flops(config, total)
    head = forward.pop("head")
    return batch * (new * sum(forward.values()) + head)


def weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of weights that one call reads: all of them but the embeddings, of which it reads single rows."""
    parts = parameters_by_part(config)
    looked_up = parts["positions"] + (0 if config.tied else parts["embedding"])
    return dtype_bytes * (sum(parts.values()) - looked_up)


def cache_bytes(config: ModelConfig, batch: int, total: int, dtype_bytes: int) -> int:
    """Bytes of KV cache that one call reads: `total_tokens` of each sequence, the new tokens included."""
    return batch * total * kv_cache_bytes_per_token(config, dtype_bytes)


def call_bytes(config: ModelConfig, batch: int, total: int, dtype_bytes: int) -> int:
    """Bytes of weights and KV cache that one call reads, whatever the number of new tokens."""
    return weight_bytes(config, dtype_bytes) + cache_bytes(config, batch, total, dtype_bytes)


def intensity(config: ModelConfig, batch: int, new: int, total: int, dtype_bytes: int) -> float:
    """FLOPs for each byte that one call reads."""
    return call_flops(config, batch, new, total) / call_bytes(config, batch, total, dtype_bytes)


def even_batch(config: ModelConfig, total: int, dtype_bytes: int) -> float:
    """The batch size at which KV cache and weights have the same bytes; larger batches gain little."""
    return weight_bytes(config, dtype_bytes) / cache_bytes(config, 1, total, dtype_bytes)


def ceiling(config: ModelConfig, batch: int, new: int, total: int, dtype_bytes: int, bandwidth: float = inf,
            peak: float = inf) -> float:
    """The roofline's limit in tokens/s; `bandwidth` is in bytes/s, `peak_flops` in FLOP/s."""
    read, work = call_bytes(config, batch, total, dtype_bytes), call_flops(config, batch, new, total)
    return batch * new * min(bandwidth / read, peak / work)


def answer_flops(config: ModelConfig, prompt: int, new: int, cached: bool = True) -> int:
    """FLOPs to generate `new_tokens` after a prompt of `prompt_tokens`.

    With a KV cache: a prefill, then one token a call. Without one, each call computes all tokens again.
    """
    if cached:
        steps = range(prompt + 1, prompt + new)
        return call_flops(config, 1, prompt, prompt) + sum(call_flops(config, 1, 1, S) for S in steps)
    return sum(call_flops(config, 1, S, S) for S in range(prompt, prompt + new))
