"""A KV cache for the decoder around a student's `attend`.

    cache = ExerciseKVCache(attend, config, batch=1, capacity=64)
    model.hidden(tokens, places, cache)
    cache.length += tokens.shape[1]
"""
import math

import torch

from nanoinfra.config import ModelConfig


class ExerciseKVCache:
    """Memory for keys and values of all layers, (L, 2, B, KV, capacity, K), of which `length` tokens are
    written.

    Memory that no token has written holds NaN. The caller adds to `length` once all layers have run.
    """

    def __init__(self, attend, config: ModelConfig, batch: int, capacity: int, dtype=torch.float32):
        L, KV, K = config.layers, config.kv_heads, config.head_dim
        self.core, self.length = attend, 0
        self.memory = torch.full((L, 2, batch, KV, capacity, K), math.nan, dtype=dtype)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None):
        """Attention of one layer, as the decoder calls it. `mask` is ignored."""
        return self.core(self.memory[layer], self.length, q, k, v)
