"""Whether the shards of a checkpoint make up its tensors: the check before a save and after it; no torch.

The shards themselves, and the arithmetic of checkpoint resharding, are formulas/parameters.py's TensorShard.
"""
from collections.abc import Sequence
from itertools import combinations
from math import prod

from nanoinfra.formulas.parameters import TensorShard


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or trusted; the message names the file or tensor and the reason."""


def check_shards_cover_tensor(shards: Sequence[TensorShard], name: str, shape: Sequence[int]) -> None:
    """Raise CheckpointError unless the shards hold every element of the tensor exactly once."""
    for a, b in combinations(shards, 2):
        if a.intersect(b):
            raise CheckpointError(f"tensor {name}: the pieces {a.file_key} and {b.file_key} overlap")
    held = sum(prod(shard.size) for shard in shards)
    if held != prod(shape):
        raise CheckpointError(f"tensor {name}: the pieces hold {held} of its {prod(shape)} elements")
