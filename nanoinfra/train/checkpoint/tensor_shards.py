"""Shards of logical tensors, the arithmetic behind checkpoint resharding; no torch.

A shard is a box: `size` elements from `offset` on, in every dim of a tensor of shape `full_shape`. A part of
a box is a box, so ZeRO's row range inside tensor parallelism's row or column range is again one range per
dim, and a rank of any mesh finds what it needs in the shards of any other mesh by intersecting boxes.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod


class CheckpointError(ValueError):
    """A checkpoint cannot be saved or trusted; the message names the file or tensor and the reason."""


@dataclass(frozen=True)
class TensorShard:
    """The box `[offset, offset + size)` of the logical tensor `name` of shape `full_shape`."""
    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    full_shape: tuple[int, ...]

    def __post_init__(self):
        places = list(zip(self.offset, self.size, self.full_shape))
        if not (len(self.offset) == len(self.size) == len(self.full_shape)
                and all(0 <= o and 0 <= s and o + s <= f for o, s, f in places)):
            raise ValueError(f"{self.name}: no box of size {list(self.size)} at {list(self.offset)} fits "
                             f"in a tensor of shape {list(self.full_shape)}; slice it from "
                             "TensorShard.of_whole_tensor(name, shape)")

    @classmethod
    def of_whole_tensor(cls, name: str, shape: Sequence[int]) -> "TensorShard":
        """The shard that is the whole tensor."""
        return cls(name, (0,) * len(shape), tuple(shape), tuple(shape))

    def slice_dim(self, dim: int, start: int, stop: int) -> "TensorShard":
        """The part from `start` up to `stop` along `dim`, counted within this shard, so slices compose."""
        if not 0 <= start <= stop <= self.size[dim]:
            raise ValueError(f"cannot cut {start}:{stop} from the {self.size[dim]} places of {self.file_key} "
                             f"in dim {dim}; count from its own start")
        offset, size = list(self.offset), list(self.size)
        offset[dim], size[dim] = self.offset[dim] + start, stop - start
        return replace(self, offset=tuple(offset), size=tuple(size))

    def intersect(self, other: "TensorShard") -> "TensorShard | None":
        """The box that two shards of one tensor share; None when they share no element."""
        begin = [max(a, b) for a, b in zip(self.offset, other.offset)]
        end = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size)]
        if any(b >= e for b, e in zip(begin, end)):
            return None
        return replace(self, offset=tuple(begin), size=tuple(e - b for b, e in zip(begin, end)))

    def slices_within(self, outer: "TensorShard | None" = None) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds the shard `outer`; by default in the whole tensor."""
        base = outer.offset if outer else (0,) * len(self.full_shape)
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, base, self.size))

    @property
    def file_key(self) -> str:
        """Its key in a safetensors file: `w` for all of w, else with its ranges, as in `w[0:3, 4:8]`."""
        if self.size == self.full_shape:
            return self.name
        return f"{self.name}[{', '.join(f'{o}:{o + s}' for o, s in zip(self.offset, self.size))}]"


def check_shards_cover_tensor(shards: Sequence[TensorShard], name: str, shape: Sequence[int]) -> None:
    """Raise CheckpointError unless the shards hold every element of the tensor exactly once."""
    for a, b in combinations(shards, 2):
        if a.intersect(b):
            raise CheckpointError(f"tensor {name}: the pieces {a.file_key} and {b.file_key} overlap")
    held = sum(prod(shard.size) for shard in shards)
    if held != prod(shape):
        raise CheckpointError(f"tensor {name}: the pieces hold {held} of its {prod(shape)} elements")
