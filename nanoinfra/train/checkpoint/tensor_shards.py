"""Pieces of logical tensors: the arithmetic of boxes that lets a checkpoint change its mesh. No torch.

A piece is a box: `size` places from `offset` on, in every dim of a tensor of shape `full`. A part of a box
is a box, so ZeRO's row range inside tensor parallelism's row or column range is again one range per dim,
and a rank of any mesh finds what it needs in the pieces of any other by intersecting boxes.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod


class CheckpointError(ValueError):
    """A checkpoint that cannot be saved or trusted: one line naming the file or tensor, and the reason."""


@dataclass(frozen=True)
class Piece:
    """The box `[offset, offset + size)` of the logical tensor `name`, which has the shape `full`."""
    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    full: tuple[int, ...]

    def __post_init__(self):
        places = list(zip(self.offset, self.size, self.full))
        if not (len(self.offset) == len(self.size) == len(self.full)
                and all(0 <= o and 0 <= s and o + s <= f for o, s, f in places)):
            raise ValueError(f"{self.name}: no box of size {list(self.size)} at {list(self.offset)} fits "
                             f"in a tensor of shape {list(self.full)}; cut it from Piece.whole(name, shape)")

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> "Piece":
        """All of a tensor."""
        return cls(name, (0,) * len(shape), tuple(shape), tuple(shape))

    def cut(self, dim: int, start: int, stop: int) -> "Piece":
        """The part from `start` up to `stop` along `dim`, counted within this piece, so cuts compose."""
        if not 0 <= start <= stop <= self.size[dim]:
            raise ValueError(f"cannot cut {start}:{stop} from the {self.size[dim]} places of {self.key} in "
                             f"dim {dim}; count from its own start")
        offset, size = list(self.offset), list(self.size)
        offset[dim], size[dim] = self.offset[dim] + start, stop - start
        return replace(self, offset=tuple(offset), size=tuple(size))

    def overlap(self, other: "Piece") -> "Piece | None":
        """The box common to two pieces of one tensor; None where they share no element."""
        begin = [max(a, b) for a, b in zip(self.offset, other.offset)]
        end = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size)]
        if any(b >= e for b, e in zip(begin, end)):
            return None
        return replace(self, offset=tuple(begin), size=tuple(e - b for b, e in zip(begin, end)))

    def within(self, outer: "Piece | None" = None) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds the piece `outer`; by default in the whole tensor."""
        base = outer.offset if outer else (0,) * len(self.full)
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, base, self.size))

    @property
    def key(self) -> str:
        """Its name in a file: `w` for all of w, else with the range of each dim, as in `w[0:3, 4:8]`."""
        if self.size == self.full:
            return self.name
        return f"{self.name}[{', '.join(f'{o}:{o + s}' for o, s in zip(self.offset, self.size))}]"


def check_cover(pieces: Sequence[Piece], name: str, shape: Sequence[int]) -> None:
    """Raise CheckpointError unless the pieces hold every element of the tensor exactly once."""
    for a, b in combinations(pieces, 2):
        if a.overlap(b):
            raise CheckpointError(f"tensor {name}: the pieces {a.key} and {b.key} overlap")
    held = sum(prod(piece.size) for piece in pieces)
    if held != prod(shape):
        raise CheckpointError(f"tensor {name}: the pieces hold {held} of its {prod(shape)} elements")
