"""The cost of inference: FLOPs and bytes of one forward call, and the roofline's limit in tokens a second.

A call computes T new tokens of each of B sequences, which then have S tokens: prefill has T = S, decode has
T = 1. It reads all weights and S cached tokens of each sequence: Psi d + B S (2 L KV K d) bytes, d bytes for
a weight or key; activations are left out. So tokens/s <= B T / max(bytes / bandwidth, FLOPs / peak FLOPs).
Pope et al. 2022, section 2; the roofline of Williams et al. 2009.
"""
from math import inf

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops_per_token
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameter_count_by_part


def inference_flops(config: ModelConfig, batch: int, new_tokens: int, total_tokens: int) -> int:
    """FLOPs of one forward call: `batch` sequences of `total_tokens`, of which `new_tokens` are computed.

    The head computes the last token of each sequence alone. By convention every query meets all
    `total_tokens` keys, as in flops.py.
    """
    forward = forward_flops_per_token(config, total_tokens)
    head = forward.pop("head")
    return batch * (new_tokens * sum(forward.values()) + head)


def weight_bytes_read(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of weights that one call reads: all of them but the embeddings, of which it reads single rows."""
    parts = parameter_count_by_part(config)
    looked_up = parts["positions"] + (0 if config.tied else parts["embedding"])
    return dtype_bytes * (sum(parts.values()) - looked_up)


def kv_cache_bytes_read(config: ModelConfig, batch: int, total_tokens: int, dtype_bytes: int) -> int:
    """Bytes of KV cache that one call reads: `total_tokens` of each sequence, the new tokens included."""
    return batch * total_tokens * kv_cache_bytes_per_token(config, dtype_bytes)


def inference_bytes_read(config: ModelConfig, batch: int, total_tokens: int, dtype_bytes: int) -> int:
    """Bytes of weights and KV cache that one call reads, whatever the number of new tokens."""
    kv_cache = kv_cache_bytes_read(config, batch, total_tokens, dtype_bytes)
    return weight_bytes_read(config, dtype_bytes) + kv_cache


def arithmetic_intensity(config: ModelConfig, batch: int, new_tokens: int, total_tokens: int,
                         dtype_bytes: int) -> float:
    """FLOPs for each byte that one call reads."""
    flops = inference_flops(config, batch, new_tokens, total_tokens)
    return flops / inference_bytes_read(config, batch, total_tokens, dtype_bytes)


def batch_size_where_cache_equals_weights(config: ModelConfig, total_tokens: int, dtype_bytes: int) -> float:
    """The batch size at which KV cache and weights have the same bytes; larger batches gain little."""
    return weight_bytes_read(config, dtype_bytes) / kv_cache_bytes_read(config, 1, total_tokens, dtype_bytes)


def max_tokens_per_second(config: ModelConfig, batch: int, new_tokens: int, total_tokens: int,
                          dtype_bytes: int, bandwidth: float = inf, peak_flops: float = inf) -> float:
    """The roofline's limit in tokens/s; `bandwidth` is in bytes/s, `peak_flops` in FLOP/s."""
    bytes_read = inference_bytes_read(config, batch, total_tokens, dtype_bytes)
    flops = inference_flops(config, batch, new_tokens, total_tokens)
    return batch * new_tokens * min(bandwidth / bytes_read, peak_flops / flops)


def generation_flops(config: ModelConfig, prompt_tokens: int, new_tokens: int, use_cache: bool = True) -> int:
    """FLOPs to generate `new_tokens` after a prompt of `prompt_tokens`.

    With a KV cache: a prefill, then one token a call. Without one, each call computes all tokens again.
    """
    if use_cache:
        prefill = inference_flops(config, 1, prompt_tokens, prompt_tokens)
        totals = range(prompt_tokens + 1, prompt_tokens + new_tokens)
        return prefill + sum(inference_flops(config, 1, 1, total) for total in totals)
    totals = range(prompt_tokens, prompt_tokens + new_tokens)
    return sum(inference_flops(config, 1, total, total) for total in totals)
