"""Sequence parallelism: outside of the matrices, each rank keeps hidden states of T/t tokens, not of all T.

An all-reduce is a reduce-scatter and an all-gather. Between the two are norms and residual sums, which need
no other token, so each rank keeps 1/t of their activations. 2 all-gathers and 2 reduce-scatters a layer,
forward and backward: 8 (t-1)/t BTC elements, as without; but the gathered input of the matrices is then saved
whole. The paper gathers it again in backward: 10 (t-1)/t, and all activations are sharded by t. Korthikanti
et al. 2022, section 4.2.2. Where t does not divide T, the last rank's tokens are padded with zeros. B
sequences, T tokens, C width, t ranks.
"""
from math import ceil

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import AsyncCollective
from nanoinfra.distributed.mesh import MeshAxis
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion


class SequenceParallelRegion(TensorParallelRegion):
    """Each rank has the hidden states of ceil(T/t) tokens: (B, ceil(T/t), C).

    `save_gathered`: save the gathered input for backward; else backward gathers it again. The region must
    know T: from the embedding, which runs first, or from `set_seq_len`.
    """

    def __init__(self, axis: MeshAxis, save_gathered: bool):
        super().__init__(axis)
        self.save_gathered, self.seq_len = save_gathered, None

    def set_seq_len(self, seq_len: int) -> None:
        """Set T, for the collectives that follow."""
        self.seq_len = seq_len

    def local_seq_len(self, seq_len: int) -> int:
        """ceil(T/t): tokens of a sequence whose hidden states this rank holds, with padding."""
        return ceil(seq_len / self.axis.size)

    def gather_input(self, x: torch.Tensor, tag: str) -> tuple[torch.Tensor, torch.Tensor]:
        """All-gather the input of all tokens (B, T, C); returns it and what of it is saved for backward."""
        full_input = self._join_tokens(comm.all_gather(x, self.axis, tag))    # (B, T, C)
        return full_input, full_input if self.save_gathered else x

    def regather_input(self, saved: torch.Tensor, tag: str) -> "AsyncCollective | _AfterWait":
        """In backward: the input of all tokens once more, saved or gathered again."""
        if self.save_gathered:
            return AsyncCollective(saved)
        return _AfterWait(comm.all_gather(saved, self.axis, tag, async_op=True), self._join_tokens)

    def reduce_input_grad(self, grad: torch.Tensor, tag: str) -> AsyncCollective:
        """Reduce-scatter the partial gradients `grad` (B, T, C): this rank's tokens of the sum."""
        return comm.reduce_scatter(self._split_tokens(grad), self.axis, tag, async_op=True)

    def reduce_output(self, y: torch.Tensor, tag: str) -> torch.Tensor:
        """Reduce-scatter the partial outputs `y` (B, T, C): this rank's tokens of the sum."""
        self.seq_len = y.shape[1]
        return self.reduce_input_grad(y, tag).wait()

    def gather_output_grad(self, grad: torch.Tensor, tag: str) -> torch.Tensor:
        """All-gather the output's gradient of all tokens: (B, T, C)."""
        return self._join_tokens(comm.all_gather(grad, self.axis, tag))

    def local_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """This rank's tokens' positions (..., ceil(T/t)) of all positions (..., T), padded with zeros."""
        each = ceil(positions.shape[-1] / self.axis.size)
        padded = F.pad(positions, (0, each * self.axis.size - positions.shape[-1]))
        return padded.narrow(-1, self.axis.rank * each, each)

    def _join_tokens(self, parts):
        """(t, B, ceil(T/t), C) -> (B, T, C)."""
        joined = parts.movedim(0, 1).flatten(1, 2)                           # (B, t ceil(T/t), C)
        if not 0 <= joined.shape[1] - self.seq_len < self.axis.size:
            raise RuntimeError(f"{joined.shape[1]} tokens come back where {self.seq_len} left: a backward "
                               "ran after the forward of a batch of another length")
        return joined[:, :self.seq_len]

    def _split_tokens(self, whole):
        """(B, T, C) -> (t, B, ceil(T/t), C)."""
        each = ceil(whole.shape[1] / self.axis.size)
        if missing := each * self.axis.size - whole.shape[1]:                # F.pad copies even for 0
            whole = F.pad(whole, (0, 0, 0, missing))
        return whole.unflatten(1, (-1, each)).movedim(1, 0)


class _AfterWait:
    """A collective that is still running, and a function to apply to its result."""

    def __init__(self, collective, function):
        self._collective, self._function = collective, function

    def wait(self):
        """Block until done: the function of the collective's result."""
        return self._function(self._collective.wait())


class SequenceParallelPositionEmbedding(nn.Module):
    """Learned position embeddings of this rank's tokens only."""

    def __init__(self, embedding: nn.Embedding, region: SequenceParallelRegion):
        super().__init__()
        self.weight, self.region = embedding.weight, region

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """(T,) or (B, T) positions to (..., ceil(T/t), C)."""
        return F.embedding(self.region.local_positions(positions), self.weight)
