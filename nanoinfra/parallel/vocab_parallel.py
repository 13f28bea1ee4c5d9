"""The two ends of the model, sharded along the vocabulary: embedding, LM head, and the head's loss.

Each rank looks up the tokens of its own rows, and the sum over the axis is the embedding. Each rank computes
its columns of the logits, (B, T, V/t), and no rank ever has them all: the loss needs three all-reduces of B T
numbers, the maximum, the sum of exponentials and the target's logit. Head and loss are one function (fused
linear cross-entropy, vocabulary-parallel), which gives -log p of each target: the logits are overwritten, a
few rows at a time, by softmax - onehot, whose rows backward multiplies by what each -log p weighs in the loss
(train/loss.py). Shoeybi et al. 2019, section 3; Liger (Hsu et al. 2024).  N rows (B T of them), C width, V
vocabulary, t ranks.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import single_rank_axis
from nanoinfra.parallel.tensor_parallel import (
    TensorParallelRegion,
    column_parallel_linear,
    inputs_needing_grad,
)

_LOGITS_CHUNK_BYTES = 2 << 20                # of rows worked on at a time: they fit a core's cache
_SOFTMAX_GRAD_SCALE = 64.0                   # float16 has few bits for probabilities below 6e-5


class VocabParallelEmbedding(nn.Module):
    """`embedding`, of which this rank has the rows from token `vocab_start` on."""

    def __init__(self, embedding: nn.Embedding, vocab_start: int, region: TensorParallelRegion):
        super().__init__()
        self.weight, self.vocab_start, self.region = embedding.weight, vocab_start, region

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens to hidden states (B, T, C), with sequence parallelism this rank's tokens of them."""
        return self.region.reduce_from_region(_Lookup.apply(tokens - self.vocab_start, self.weight), "ends")


class ParallelLMHead(nn.Module):
    """`head`, of which this rank has the rows from token `vocab_start` on; `vocab` tokens in all."""

    def __init__(self, head: nn.Linear, vocab_start: int, vocab: int, region: TensorParallelRegion):
        super().__init__()
        self.weight, self.bias, self.region = head.weight, None, region
        self.vocab_start, self.vocab = vocab_start, vocab

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits (..., V) on every rank, gathered: for generation, not for training."""
        logits, = column_parallel_linear(self.region, hidden, self, tag="ends")                # (..., V/t)
        return _GatherLogits.apply(logits, self.region.axis, self.vocab)


class VocabParallelCrossEntropy(nn.Module):
    """The LM head, sharded or whole, and its cross-entropy by token as one module, so that hooks see both."""

    def __init__(self, head: ParallelLMHead | nn.Linear):
        super().__init__()
        self.head = head
        if isinstance(head, ParallelLMHead):
            self._region_and_start = head.region, head.vocab_start
        else:
            self._region_and_start = TensorParallelRegion(single_rank_axis("tp")), 0

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p of each target (B, T), 0 where it is IGNORE_INDEX; softmax in at least float32.

        `hidden` (B, T, C), with sequence parallelism this rank's tokens of it; `targets` (B, T). The result
        is in the wide dtype and the same on all ranks of the axis.
        """
        return vocab_parallel_cross_entropy(hidden, self.head.weight, targets, *self._region_and_start)


def vocab_parallel_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                                 region: TensorParallelRegion, vocab_start: int) -> torch.Tensor:
    """VocabParallelCrossEntropy for a head's `weight` (V/t, C), the rows from token `vocab_start` on."""
    return _FusedLinearCrossEntropy.apply(hidden, weight, targets, region, vocab_start)


class _Lookup(torch.autograd.Function):
    """Rows of `weight` (n, C) at `indices`; zeros for indices of other ranks.

    The gradient is sparse: of V rows, few are looked up in a micro-batch.
    """

    @staticmethod
    def forward(ctx, indices, weight):
        n = len(weight)
        indices = indices.where((indices >= 0) & (indices < n), n)           # n: another rank's
        ctx.save_for_backward(indices)
        ctx.n = n
        return F.embedding(indices.clamp(max=n - 1), weight).masked_fill_((indices == n)[..., None], 0)

    @staticmethod
    def backward(ctx, grad):
        indices, = ctx.saved_tensors
        rows = grad.masked_fill((indices == ctx.n)[..., None], 0).flatten(0, -2)              # (B T, C)
        where = indices.clamp(max=ctx.n - 1).view(1, -1)
        return None, torch.sparse_coo_tensor(where, rows, (ctx.n, rows.shape[1]), check_invariants=False)


class _GatherLogits(torch.autograd.Function):
    """All-gather (..., V/t) of each rank, of the last one fewer, to (..., V) on all ranks."""

    @staticmethod
    def forward(ctx, logits, axis, vocab):
        each = -(-vocab // axis.size)
        ctx.start, ctx.n = axis.rank * each, logits.shape[-1]
        parts = comm.all_gather(F.pad(logits, (0, each - ctx.n)), axis, "ends")   # (t, ..., ceil(V/t))
        return parts.movedim(0, -2).flatten(-2)[..., :vocab]                 # (..., V)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.start, ctx.n), None, None


class _FusedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, region, vocab_start):
        full_hidden, saved = region.gather_input(hidden, "ends")             # (B, T, C)
        logits = full_hidden.flatten(0, -2) @ weight.T                       # (N, V/t), becomes its gradient
        wide = torch.promote_types(logits.dtype, torch.float32)
        valid, index = targets.flatten() != IGNORE_INDEX, targets.flatten() - vocab_start
        is_local = valid & (index >= 0) & (index < len(weight))
        index = index.where(is_local, 0)[:, None]                            # (N, 1)
        log_sum_exp = _log_sum_exp(logits, region.axis, wide)                # (N,)
        score = comm.all_reduce(logits.gather(1, index)[:, 0].to(wide) * is_local, region.axis, "loss")
        per_row = (logits, log_sum_exp, index, is_local, valid)
        for rows in zip(*(x.split(_rows_per_chunk(logits, wide)) for x in per_row)):
            _softmax_minus_onehot(*rows)
        ctx.save_for_backward(saved, weight, logits)
        ctx.region, ctx.shape = region, full_hidden.shape
        return ((log_sum_exp - score) * valid).view(targets.shape)           # (B, T)

    @staticmethod
    def backward(ctx, upstream):
        """The rows' factors `upstream` (B, T) commute with the products: they multiply what has C columns."""
        (saved, weight, grad), factors = ctx.saved_tensors, upstream.reshape(-1, 1) / _SOFTMAX_GRAD_SCALE
        needs_hidden, needs_weight, *_ = inputs_needing_grad(ctx)
        gathered = ctx.region.regather_input(saved, "ends") if needs_weight else None
        d_hidden, d_weight = comm.AsyncCollective(), None
        if needs_hidden:
            partial = grad @ weight                                          # (N, C), this rank's part
            _multiply_rows(partial, factors, out=partial)
            d_hidden = ctx.region.reduce_input_grad(partial.view(ctx.shape), "ends")
        if gathered:
            hidden = gathered.wait().flatten(0, -2)                          # (N, C)
            d_weight = grad.T @ _multiply_rows(hidden, factors, out=torch.empty_like(hidden))     # (V/t, C)
        return d_hidden.wait(), d_weight, None, None, None


def _multiply_rows(x, factors, out):
    """`x` (N, C) times `factors` (N, 1) in the factors' dtype, rounded once into `out`; no wide copy of x."""
    for part in zip(*(each.split(_rows_per_chunk(x, factors.dtype)) for each in (x, factors, out))):
        torch.mul(*part[:2], out=part[2])
    return out


def _log_sum_exp(logits, axis, wide):
    """log sum exp of each row (N, V/t), over all ranks' columns: (N,); exp of differences to the maximum."""
    mine = torch.cat([part.to(wide).logsumexp(1) for part in logits.split(_rows_per_chunk(logits, wide))])
    top = comm.all_reduce(mine.clone(), axis, "loss", op="max")
    return comm.all_reduce((mine - top).exp_(), axis, "loss").log_().add_(top)


def _softmax_minus_onehot(logits, log_sum_exp, index, is_local, valid):
    """Overwrite `logits` (rows, V/t) by d loss / d logits, times _SOFTMAX_GRAD_SCALE."""
    p = (logits.to(log_sum_exp.dtype) - log_sum_exp[:, None]).exp_()         # (rows, V/t)
    p.scatter_add_(1, index, -is_local[:, None].to(p.dtype))
    logits.copy_(p.mul_(valid[:, None] * _SOFTMAX_GRAD_SCALE))


def _rows_per_chunk(x, wide):
    return max(1, _LOGITS_CHUNK_BYTES // (max(1, x.shape[1]) * wide.itemsize))
