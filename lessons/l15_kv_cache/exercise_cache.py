"""A KV cache around a student's `attend`, and a picture of who sees whom in a call.

    cache = Cache(attend, config, batch=1, capacity=64)
    model.hidden(tokens, places, cache)
    cache.length += tokens.shape[1]
"""
import math

import torch

from nanoinfra.config import ModelConfig


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
