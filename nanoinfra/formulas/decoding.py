"""What a call of a served decoder costs, and how many tokens a second it can give at most.

A call runs T new tokens of each of B sequences, which then have S: prefill is T = S, decode T = 1. It reads
all weights once and S cached tokens of each sequence, Psi d + B S (2 L KV K d) bytes, activations aside, so

    tokens/s <= B T / max(bytes / bandwidth, FLOPs / peak)

Pope et al. 2022, section 2; the roofline of Williams et al. 2009. `dtype_bytes` d of a weight and of a key.
"""
from math import inf

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameters_by_part


def call_flops(config: ModelConfig, batch: int, new: int, total: int) -> int:
    """FLOPs of a call of `new` tokens that see `total`; the head reads the last one of each sequence.

    By convention every query meets all `total` keys, as in flops.py.
    """
    forward = forward_flops(config, total)
    head = forward.pop("head")
    return batch * (new * sum(forward.values()) + head)


def weight_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the weights that a call reads whole: all but what is looked up, row by row."""
    parts = parameters_by_part(config)
    looked_up = parts["positions"] + (0 if config.tied else parts["embedding"])
    return dtype_bytes * (sum(parts.values()) - looked_up)


def cache_bytes(config: ModelConfig, batch: int, total: int, dtype_bytes: int) -> int:
    """Bytes of keys and values that a call reads, `total` tokens of each sequence: the new ones too."""
    return batch * total * kv_cache_bytes_per_token(config, dtype_bytes)


def call_bytes(config: ModelConfig, batch: int, total: int, dtype_bytes: int) -> int:
    """Bytes that a call reads, however many tokens are new."""
    return weight_bytes(config, dtype_bytes) + cache_bytes(config, batch, total, dtype_bytes)


def intensity(config: ModelConfig, batch: int, new: int, total: int, dtype_bytes: int) -> float:
    """FLOPs a byte that is read."""
    return call_flops(config, batch, new, total) / call_bytes(config, batch, total, dtype_bytes)


def even_batch(config: ModelConfig, total: int, dtype_bytes: int) -> float:
    """Sequences of `total` tokens whose cache is as large as the weights: past it, batching gains little."""
    return weight_bytes(config, dtype_bytes) / cache_bytes(config, 1, total, dtype_bytes)


def ceiling(config: ModelConfig, batch: int, new: int, total: int, dtype_bytes: int, bandwidth: float = inf,
            peak: float = inf) -> float:
    """Tokens/s of calls of `new` tokens that see `total`, at most: `bandwidth` in B/s, `peak` in FLOP/s."""
    read, work = call_bytes(config, batch, total, dtype_bytes), call_flops(config, batch, new, total)
    return batch * new * min(bandwidth / read, peak / work)


def answer_flops(config: ModelConfig, prompt: int, new: int, cached: bool = True) -> int:
    """FLOPs of `new` tokens after a prompt: prefill and a token a call, or all tokens again in each call."""
    if cached:
        steps = range(prompt + 1, prompt + new)
        return call_flops(config, 1, prompt, prompt) + sum(call_flops(config, 1, 1, S) for S in steps)
    return sum(call_flops(config, 1, S, S) for S in range(prompt, prompt + new))
