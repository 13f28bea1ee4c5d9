"""Sequence parallelism: where tensor parallelism keeps the stream whole on every rank, cut it along T.

An all-reduce is a reduce-scatter and an all-gather: between the two lie norms and residual sums, which need
no neighbour, so each rank has T/t tokens of them and keeps 1/t of their activations. 2 gathers and 2
reduce-scatters a layer, forward and backward: 8 (t-1)/t BTC elements, as without; but what matrices read
is then kept whole. The paper gathers it again in backward: 10 (t-1)/t, and all activations are cut by t.
Korthikanti et al. 2022, section 4.2. Where t does not divide T, the last rank's share ends in rows of zeros.
B sequences, T tokens, C width, t ranks.
"""
from math import ceil

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import Pending
from nanoinfra.parallel.tensor_parallel import Whole

SP = ("none", "keep", "gather")


class Cut(Whole):
    """The region that gives each rank ceil(T/t) tokens of the stream: (B, ceil(T/t), C).

    `keep` what was gathered for backward, or gather it again. T is noted by `leave`, the embedding's coming
    first, or by `share`.
    """

    def __init__(self, axis, keep: bool):
        super().__init__(axis)
        self.keep, self.tokens = keep, None

    def share(self, tokens: int) -> int:
        """ceil(T/t)."""
        self.tokens = tokens
        return ceil(tokens / self.axis.size)

    def enter(self, x: torch.Tensor, tag: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens of the stream `x`, and what is kept of it for backward."""
        whole = self._gathered(comm.all_gather(x, self.axis, tag))           # (B, T, C)
        return whole, whole if self.keep else x

    def again(self, kept: torch.Tensor, tag: str) -> Pending:
        """All tokens once more."""
        if self.keep:
            return Pending(kept)
        pending = comm.all_gather(kept, self.axis, tag, wait=False)
        return Then(pending, self._gathered)

    def back(self, grad: torch.Tensor, tag: str) -> Pending:
        """My tokens' rows of the sum of `grad` (B, T, C)."""
        return comm.reduce_scatter(self._parts(grad), self.axis, tag, wait=False)

    def reduce(self, y: torch.Tensor, tag: str) -> torch.Tensor:
        """My tokens' rows of the sum of `y` (B, T, C)."""
        self.tokens = y.shape[1]
        return self.back(y, tag).wait()

    def spread(self, grad: torch.Tensor, tag: str) -> torch.Tensor:
        """Every rank's rows of the gradient: (B, T, C)."""
        return self._gathered(comm.all_gather(grad, self.axis, tag))

    def mine(self, places: torch.Tensor) -> torch.Tensor:
        """Of (..., T) positions those of my tokens, (..., ceil(T/t)); after the last come zeros."""
        each = ceil(places.shape[-1] / self.axis.size)
        padded = F.pad(places, (0, each * self.axis.size - places.shape[-1]))
        return padded.narrow(-1, self.axis.rank * each, each)

    def _gathered(self, parts):
        """(t, B, ceil(T/t), C) -> (B, T, C)."""
        whole = parts.movedim(0, 1).flatten(1, 2)                            # (B, t ceil(T/t), C)
        if not 0 <= whole.shape[1] - self.tokens < self.axis.size:
            raise RuntimeError(f"{whole.shape[1]} tokens come back where {self.tokens} left: a backward ran "
                               "after the forward of a batch of another length")
        return whole[:, :self.tokens]

    def _parts(self, whole):
        """(B, T, C) -> (t, B, ceil(T/t), C)."""
        each = ceil(whole.shape[1] / self.axis.size)
        if missing := each * self.axis.size - whole.shape[1]:              # else F.pad would copy for nothing
            whole = F.pad(whole, (0, 0, 0, missing))
        return whole.unflatten(1, (-1, each)).movedim(1, 0)


class Then:
    """A collective under way, and what is to be done with its result."""

    def __init__(self, pending: Pending, do):
        self.pending, self.do = pending, do

    def wait(self):
        """Block until done: what `do` makes of the result."""
        return self.do(self.pending.wait())


class CutPositions(nn.Module):
    """Learned positions of my tokens alone."""

    def __init__(self, positions: nn.Embedding, region: Cut):
        super().__init__()
        self.weight, self.region = positions.weight, region

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """(T,) or (B, T) positions to (..., ceil(T/t), C)."""
        return F.embedding(self.region.mine(places), self.weight)
