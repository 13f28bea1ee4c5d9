"""How our parameters map to stored tensors of other formats, and how a part of a parameter is read from them.

A tensor-parallel rank reads its shard of every parameter and no more; a part is one slice for each dim.
Stored matrices can be transposed (GPT-2), can fuse several of ours one after another (q, k and v in GPT-2 and
Phi-3, gate and up in Phi-3) or interleaved head by head (BLOOM), or can begin with rows that no parameter has
(OPT). So one part of ours can be several parts of a stored tensor.
"""
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_shapes

TensorSlices = tuple[slice, ...]
"""The index of a part, as torch and safetensors take it; () is all of a tensor.

Of our tensors it is a `TensorShard.slices_within()`. Stored ones, which fuse or turn ours, have no shards.
"""


class TensorSource(NamedTuple):
    """Where one of our parameters lies in a stored tensor."""
    stored_name: str
    transposed: bool = False             # stored (in, out): GPT-2's Conv1D
    fused_linears: tuple[str, ...] = ()  # linears of a block that are stored in one tensor, ours among them
    interleave_index: int | None = None  # fused head by head, (H, 3, K) rows: ours is this one of the three
    rows_before: int = 0                 # stored before our first row; `parameter_sources` adds fused ones
    rows_after: int = 0                  # stored after our last row


def parameter_sources(config: ModelConfig, table: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """Where each parameter of a decoder lies: a family's `table`, whose names have {i}, for every layer."""
    found, shapes = {}, parameter_shapes(config)
    for name in shapes:
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        block = f"blocks.{layer}."
        source = table[name.replace(block, "blocks.{i}.", 1) if layer else name]
        if source.fused_linears:
            linear, _, kind = name.removeprefix(block).rpartition(".")
            rows = [shapes[f"{block}{x}.{kind}"][0] for x in source.fused_linears]
            at = source.fused_linears.index(linear)
            source = source._replace(rows_before=sum(rows[:at]), rows_after=sum(rows[at + 1:]))
        found[name] = source._replace(stored_name=source.stored_name.replace("{i}", layer))
    return found


def shape_from_stored(source: TensorSource, stored_shape: Sequence[int]) -> tuple:
    """The shape that our parameter has in a stored tensor of `stored_shape`.

    A fraction of rows means that q, k and v cannot share the tensor; no parameter has such a shape.
    """
    if not stored_shape:
        return ()
    rows, *rest = reversed(stored_shape) if source.transposed else stored_shape
    if source.interleave_index is not None:
        rows = rows // 3 if rows % 3 == 0 else rows / 3
    return (rows - source.rows_before - source.rows_after, *rest)


def read_parameter_slices(source: TensorSource, shape: Sequence[int], head_dim: int, slices: TensorSlices,
                          read_stored: Callable[[str, TensorSlices], torch.Tensor]) -> torch.Tensor:
    """Read a part of our parameter, as `resolve_slices` gives it, by `read_stored(stored_name, slices)`."""
    (rows, *rest), found = slices, []
    for start, stop in _stored_rows(source, rows.start, rows.stop, head_dim):
        part = (slice(start, stop), *rest)
        x = read_stored(source.stored_name, part[::-1] if source.transposed else part)
        found.append(x.mT if source.transposed else x)
    return found[0] if len(found) == 1 else torch.cat(found)


def join_to_stored_tensor(source: TensorSource, head_dim: int,
                          parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor to store, from the parameters that it fuses; `source` is the first one's.

    Rows that no parameter has are zeros.
    """
    if source.interleave_index is not None:
        stacked = torch.stack([x.unflatten(0, (-1, head_dim)) for x in parameters], dim=1)    # (H, 3, K, ...)
        parameters = [stacked.flatten(0, 2)]
    first = parameters[0]
    x = torch.cat([first.new_zeros(source.rows_before, *first.shape[1:]), *parameters])
    return (x.mT if source.transposed else x).contiguous()


def resolve_slices(name: str, shape: Sequence[int], slices: TensorSlices) -> TensorSlices:
    """`slices` with explicit start and stop. Raises ValueError where a tensor of `shape` has no such part."""
    found = tuple(slice(part.start or 0, size if part.stop is None else part.stop)
                  for part, size in zip(slices or (slice(None),) * len(shape), shape))
    is_wrong = slices and (len(slices) != len(shape) or any(part.step not in (None, 1) for part in slices))
    if is_wrong or not all(
            0 <= part.start <= part.stop <= size for part, size in zip(found, shape)):
        raise ValueError(f"{name} has no part {slices}: its shape is {tuple(shape)}; give slices with "
                         "0 <= start <= stop <= size, one for each dim")
    return found


def _stored_rows(source, start, stop, head_dim):
    """(start, stop) of each run of stored rows that hold our rows from `start` to `stop`, in our order."""
    if source.interleave_index is None or start == stop:
        return [(start + source.rows_before, stop + source.rows_before)]
    found = []
    for head in range(start // head_dim, -(-stop // head_dim)):
        moved = (2 * head + source.interleave_index) * head_dim           # (3 head + index) - head
        found.append((max(start, head * head_dim) + moved, min(stop, (head + 1) * head_dim) + moved))
    return found
