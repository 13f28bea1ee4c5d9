"""The batch: the tokens, targets, weights, positions and document ends of one micro-batch, as one value.

The loader makes it, the model reads tokens, positions and document ends, the objective reads targets and
weights (train/loss.py). Sequence packing puts documents end to end in one row, without padding: positions
start at 0 in each, and attention stays within a document (Krell et al. 2021).
B sequences, T tokens.
"""
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from nanoinfra.data.token_datasets import IGNORE_INDEX


class Batch(NamedTuple):
    """One micro-batch of B sequences of T tokens."""
    tokens: torch.Tensor                     # (B, T) int64
    targets: torch.Tensor                    # (B, T) int64; IGNORE_INDEX where there is none
    weights: torch.Tensor | None = None      # (B, T) of each target in the loss; None: 1 for each valid one
    positions: torch.Tensor | None = None    # (T,) or (B, T) int64; None: 0..T-1
    document_ends: tuple[int, ...] | None = None     # of the documents packed in the one row; the last is T

    @property
    def num_valid_targets(self) -> int:
        """Number of targets other than IGNORE_INDEX."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with its tensors on `device`."""
        return Batch(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))


def pack_documents(documents: Sequence[tuple[torch.Tensor, ...]]) -> Batch:
    """Pack documents end to end into a batch of one row.

    A document is (tokens (t,), targets (t,)), or these and weights (t,). Where some have weights, the others
    weigh 1 for each valid target. Raises ValueError for no documents, and for one that is empty or whose
    shapes differ.
    """
    if not documents:
        raise ValueError("there are no documents to pack; give at least one")
    for number, parts in enumerate(documents):
        shapes = [tuple(part.shape) for part in parts]
        if len(parts) not in (2, 3) or shapes[0] in ((), (0,)) or shapes != [(len(parts[0]),)] * len(parts):
            raise ValueError(f"document {number} has parts of shapes {shapes}; give (tokens, targets) or "
                             "(tokens, targets, weights), each of the same (t,), t at least 1")
    tokens, targets = (torch.cat([parts[i] for parts in documents])[None] for i in (0, 1))        # (1, T)
    weights = None
    if any(len(parts) == 3 for parts in documents):
        weights = torch.cat([_document_weights(*parts) for parts in documents])[None]             # (1, T)
    lengths = [len(parts[0]) for parts in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])                           # (T,)
    return Batch(tokens, targets, weights, positions, tuple(accumulate(lengths)))


def check_batch(batch: Batch, context: int) -> None:
    """Raise ValueError where `batch` contradicts itself or has positions past the model's `context`."""
    if not isinstance(batch, Batch):
        kind = type(batch).__name__
        raise ValueError(f"a micro-batch is a Batch, and this is a {kind}; give Batch(tokens, targets)")
    if batch.tokens.dim() != 2:
        raise ValueError(f"tokens have shape {tuple(batch.tokens.shape)}; give (B, T), with B 1 for one row")
    B, T = batch.tokens.shape
    allowed = {"targets": [(B, T)], "weights": [(B, T)], "positions": [(T,), (B, T)]}
    for name, shapes in allowed.items():
        part = getattr(batch, name)
        if part is not None and tuple(part.shape) not in shapes:
            raise ValueError(f"{name} have shape {tuple(part.shape)} beside tokens of {(B, T)}; "
                             f"give {' or '.join(map(str, shapes))}")
    if batch.positions is not None:
        _check_positions(batch.positions, context)
    if batch.document_ends is not None:
        _check_document_ends(batch.document_ends, B, T)


def _document_weights(tokens, targets, weights=None):
    return (targets != IGNORE_INDEX).to(torch.float32) if weights is None else weights


def _check_positions(positions, context):
    first, last = int(positions.min()), int(positions.max())
    if first < 0 or last >= context:
        raise ValueError(f"positions go from {first} to {last}; the model's context has 0 to {context - 1}")


def _check_document_ends(ends, B, T):
    if B != 1:
        raise ValueError(f"document ends are those of one row, and the batch has {B}; pack all documents "
                         "into one row (pack_documents), or give no document ends")
    if not ends or ends[-1] != T or any(a >= b for a, b in pairwise((0, *ends))):
        raise ValueError(f"document ends {ends} do not cut {T} tokens into documents; give increasing ends, "
                         f"of which the last is {T}")
