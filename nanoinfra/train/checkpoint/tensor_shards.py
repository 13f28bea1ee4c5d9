"""Checkpoint resharding: a rank of any mesh fills its shards from those that another mesh has saved.

Also the check, before a save and after it, that shards make up their tensors. A shard is a box of the logical
tensor (formulas/parameters.py's TensorShard), so what two of them share is a box again. No torch.
"""
from collections.abc import Callable, Iterable, Sequence
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


def fill_from_stored_shards(out, wanted: TensorShard,
                            stored: Iterable[tuple[TensorShard, Callable[[], object]]]) -> None:
    """Fill `out`, a tensor of the size of the shard `wanted`, from the stored shards that overlap it.

    `stored` has each shard with a function that opens it; of what that gives, which is indexed as a tensor
    of the shard is, only the common box is read.
    """
    for shard, open_shard in stored:
        common = wanted.intersect(shard)
        if common:
            out[common.slices_within(wanted)] = open_shard()[common.slices_within(shard)]
