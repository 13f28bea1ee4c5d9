"""Where our parameters lie in a foreign file, and which of its elements make up a part of one.

A tensor-parallel rank reads its box of every parameter and no more. A box is one slice for each dim. Stored
matrices may be turned (GPT-2), hold several of ours one after another (q, k and v in GPT-2 and Phi-3, gate
and up in Phi-3) or by turns, a head of each (BLOOM), or begin with rows that are not ours (OPT), so one box
of ours may be several of theirs.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import shapes

Box = tuple[slice, ...]              # one for each dim; () is all of a tensor


class Source(NamedTuple):
    """Where one of our tensors lies in a foreign file."""
    name: str                        # the tensor's name there
    transposed: bool = False         # stored (in, out): GPT-2's Conv1D
    fused: tuple[str, ...] = ()      # linears of a block that lie there one after another, ours among them
    turn: int | None = None          # fused head by head, (H, 3, K) rows: ours are the turn-th K of each 3 K
    before: int = 0                  # rows stored before our first; `sources` counts the fused ones
    after: int = 0                   # rows stored after our last


def sources(config: ModelConfig, table: dict[str, Source]) -> dict[str, Source]:
    """Where each parameter of such a decoder lies: a family's table with its layers written out."""
    found, every = {}, shapes(config)
    for name in every:
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        block = f"blocks.{layer}."
        source = table[name.replace(block, "blocks.{i}.", 1) if layer else name]
        if source.fused:
            linear, _, kind = name.removeprefix(block).rpartition(".")
            rows = [every[f"{block}{x}.{kind}"][0] for x in source.fused]
            at = source.fused.index(linear)
            source = source._replace(before=sum(rows[:at]), after=sum(rows[at + 1:]))
        found[name] = source._replace(name=source.name.replace("{i}", layer))
    return found


def made_shape(source: Source, stored: Sequence[int]) -> tuple:
    """The shape of our parameter in a tensor of shape `stored`; broken where it holds no three of them."""
    if not stored:
        return ()
    rows, *rest = reversed(stored) if source.transposed else stored
    if source.turn is not None:
        rows = rows // 3 if rows % 3 == 0 else rows / 3
    return (rows - source.before - source.after, *rest)


def read_box(source: Source, shape: Sequence[int], head_dim: int, box: Box,
             fetch: Callable[[str, Box], torch.Tensor]) -> torch.Tensor:
    """`box`, as `bounds` gives it, of our parameter of `shape`: made of `fetch(name, box)` of stored ones."""
    (rows, *rest), found = box, []
    for start, stop in _stretches(source, rows.start, rows.stop, head_dim):
        part = (slice(start, stop), *rest)
        x = fetch(source.name, part[::-1] if source.transposed else part)
        found.append(x.mT if source.transposed else x)
    return found[0] if len(found) == 1 else torch.cat(found)


def joined(source: Source, head_dim: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The stored tensor, of ours, `source` being the first one's. Rows that are not ours are zeros."""
    if source.turn is not None:
        parts = torch.stack([x.unflatten(0, (-1, head_dim)) for x in parts], dim=1)       # (H, 3, K, ...)
        parts = [parts.flatten(0, 2)]
    x = torch.cat([parts[0].new_zeros(source.before, *parts[0].shape[1:]), *parts])
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


def _stretches(source, start, stop, head_dim):
    """(start, stop) of the stored rows that hold our rows from `start` to `stop`, in our order."""
    if source.turn is None or start == stop:
        return [(start + source.before, stop + source.before)]
    found = []
    for head in range(start // head_dim, -(-stop // head_dim)):
        moved = (2 * head + source.turn) * head_dim                       # (3 head + turn) - head
        found.append((max(start, head * head_dim) + moved, min(stop, (head + 1) * head_dim) + moved))
    return found
