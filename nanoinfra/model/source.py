"""Where our parameters lie in a foreign file, and which of its elements make up a part of one.

A tensor-parallel rank reads its box of every parameter and no more. A box is one slice for each dim. Stored
matrices may be turned (GPT-2), hold q, k and v side by side (GPT-2) or by turns, a head of each (BLOOM), or
begin with rows that are not ours (OPT), so one box of ours may be several of theirs.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nanoinfra.formulas.params import shapes
from nanoinfra.formulas.shape import ModelConfig

Box = tuple[slice, ...]              # one for each dim; () is all of a tensor


class Source(NamedTuple):
    """Where one of our tensors lies in a foreign file."""
    name: str                        # the tensor's name there
    transposed: bool = False         # stored (in, out): GPT-2's Conv1D
    third: int | None = None         # 0, 1, 2: our part of a fused q, k, v
    by_head: bool = False            # fused head by head, (H, 3, K) rows: BLOOM
    skip: int = 0                    # rows stored before our first: OPT's positions


def sources(config: ModelConfig, table: dict[str, Source]) -> dict[str, Source]:
    """Where each parameter of such a decoder lies: a family's table with its layers written out."""
    found = {}
    for name in shapes(config):
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        source = table[name.replace(f"blocks.{layer}.", "blocks.{i}.", 1) if layer else name]
        found[name] = source._replace(name=source.name.replace("{i}", layer))
    return found


def made_shape(source: Source, stored: Sequence[int]) -> tuple:
    """The shape of our parameter in a tensor of shape `stored`; broken where it holds no three of them."""
    rows, *rest = reversed(stored) if source.transposed else stored
    if source.third is not None:
        rows = rows // 3 if rows % 3 == 0 else rows / 3
    return (rows - source.skip, *rest)


def read_box(source: Source, shape: Sequence[int], head_dim: int, box: Box,
             fetch: Callable[[str, Box], torch.Tensor]) -> torch.Tensor:
    """`box`, as `bounds` gives it, of our parameter of `shape`: made of `fetch(name, box)` of stored ones."""
    (rows, *rest), found = box, []
    for start, stop in _stretches(source, rows.start, rows.stop, shape[0], head_dim):
        part = (slice(start, stop), *rest)
        x = fetch(source.name, part[::-1] if source.transposed else part)
        found.append(x.mT if source.transposed else x)
    return found[0] if len(found) == 1 else torch.cat(found)


def joined(source: Source, head_dim: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The stored tensor, of ours: q, k and v where it is fused. Rows that are not ours are zeros."""
    if source.by_head:
        parts = torch.stack([x.unflatten(0, (-1, head_dim)) for x in parts], dim=1)       # (H, 3, K, ...)
        parts = [parts.flatten(0, 2)]
    x = torch.cat([parts[0].new_zeros(source.skip, *parts[0].shape[1:]), *parts])
    return (x.mT if source.transposed else x).contiguous()


def bounds(name: str, shape: Sequence[int], box: Box) -> Box:
    """`box` with its bounds written out. ValueError where it is no part of a tensor of `shape`."""
    found = tuple(slice(part.start or 0, size if part.stop is None else part.stop)
                  for part, size in zip(box or (slice(None),) * len(shape), shape))
    if box and (len(box) != len(shape) or any(part.step not in (None, 1) for part in box)) or not all(
            0 <= part.start <= part.stop <= size for part, size in zip(found, shape)):
        raise ValueError(f"{name} has no part {box}: its shape is {tuple(shape)}; give slices with "
                         "0 <= start <= stop <= size, one for each dim")
    return found


def _stretches(source, start, stop, rows, head_dim):
    """(start, stop) of the stored rows that hold our rows from `start` to `stop`, in our order."""
    if source.third is None or start == stop:
        return [(start + source.skip, stop + source.skip)]
    each, found = head_dim if source.by_head else rows, []                # rows of q, then of k, then of v
    for turn in range(start // each, -(-stop // each)):
        moved = (2 * turn + source.third) * each                          # (3 turn + third) - turn
        found.append((max(start, turn * each) + moved, min(stop, (turn + 1) * each) + moved))
    return found
