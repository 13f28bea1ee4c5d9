"""The two ends of the model, cut along the vocabulary: embedding, head, and the head's loss.

A rank looks up the tokens that it has, and the sum over the axis is the embedding. Of the logits it has
(B, T, V/t) and no rank ever has them all: the loss needs three all-reduces of B T numbers, the maximum, the
sum of exponentials, the target's logit. The head's product and the loss are one function: the logits are
overwritten, a few rows at a time, by their own gradient softmax - onehot. Shoeybi et al. 2019, section 3.
Fused heads: Liger (Hsu et al. 2024).  N rows (B T of them), C width, V vocabulary, t ranks.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.data.sample_order import IGNORE
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import alone
from nanoinfra.parallel.tensor_parallel import Whole, needed, read

ROWS_BYTES = 2 << 20                         # of logits worked on at a time: what a core's cache holds
RAISED = 64.0                                # float16 has few bits for probabilities below 6e-5


class VocabEmbedding(nn.Module):
    """`embedding`, of which this rank has the rows from `start` on."""

    def __init__(self, embedding: nn.Embedding, start: int, region):
        super().__init__()
        self.weight, self.start, self.region = embedding.weight, start, region

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens to the region's share of (B, T, C)."""
        return self.region.leave(_Lookup.apply(tokens - self.start, self.weight), "ends")


class VocabHead(nn.Module):
    """`head`, of which this rank has the rows from `start` on; of `vocab` tokens in all."""

    def __init__(self, head: nn.Linear, start: int, vocab: int, region):
        super().__init__()
        self.weight, self.bias, self.start, self.vocab, self.region = head.weight, None, start, vocab, region

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """All logits on every rank, (..., V), of what the stream holds: for generation, not for training."""
        logits, = read(self.region, hidden, self, tag="ends")                # (..., V/t)
        return _AllColumns.apply(logits, self.region.axis, self.vocab)


class HeadLoss(nn.Module):
    """The head, cut or whole, and its loss as one module: who hooks modules sees the head's weight in use."""

    def __init__(self, head: VocabHead | nn.Linear):
        super().__init__()
        cut = isinstance(head, VocabHead)
        self.head, self.place = head, (head.region, head.start) if cut else (Whole(alone("tp")), 0)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        """-sum log p(target) / count, over targets that are not IGNORE; softmax in at least float32.

        `hidden` is the region's share of (B, T, C), `targets` (B, T). Returns () in the wide dtype, the same
        on all ranks of the axis: their share of the step's mean loss.
        """
        return cross_entropy(hidden, self.head.weight, targets, count, *self.place)


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, count: int, region,
                  start: int) -> torch.Tensor:
    """`HeadLoss` for a head's `weight` (V/t, C), the rows from `start` on."""
    return _HeadLoss.apply(hidden, weight, targets.flatten(), max(1, count), region, start)


class _Lookup(torch.autograd.Function):
    """Rows of `weight` (n, C) at `places`; zeros at places that are not in it.

    The gradient is sparse, the rows that were looked up: of V rows few are in a micro-batch.
    """

    @staticmethod
    def forward(ctx, places, weight):
        n = len(weight)
        places = places.where((places >= 0) & (places < n), n)               # n: not mine
        ctx.save_for_backward(places)
        ctx.n = n
        return F.embedding(places.clamp(max=n - 1), weight).masked_fill_((places == n)[..., None], 0)

    @staticmethod
    def backward(ctx, grad):
        places, = ctx.saved_tensors
        rows = grad.masked_fill((places == ctx.n)[..., None], 0).flatten(0, -2)              # (B T, C)
        where = places.clamp(max=ctx.n - 1).view(1, -1)
        return None, torch.sparse_coo_tensor(where, rows, (ctx.n, rows.shape[1]), check_invariants=False)


class _AllColumns(torch.autograd.Function):
    """(..., V/t) of each rank, the last one fewer, to (..., V) on all of them."""

    @staticmethod
    def forward(ctx, mine, axis, vocab):
        each = -(-vocab // axis.size)
        ctx.start, ctx.n = axis.rank * each, mine.shape[-1]
        parts = comm.all_gather(F.pad(mine, (0, each - ctx.n)), axis, "ends")   # (t, ..., ceil(V/t))
        return parts.movedim(0, -2).flatten(-2)[..., :vocab]                 # (..., V)

    @staticmethod
    def backward(ctx, grad):
        return grad.narrow(-1, ctx.start, ctx.n), None, None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count, region, start):
        whole, kept = region.enter(hidden, "ends")                           # (B, T, C)
        logits = whole.flatten(0, -2) @ weight.T                             # (N, V/t), becomes its gradient
        wide = torch.promote_types(logits.dtype, torch.float32)
        valid, at = targets != IGNORE, targets - start
        mine = valid & (at >= 0) & (at < len(weight))
        at = at.where(mine, 0)[:, None]                                      # (N, 1)
        total = _log_sum_exp(logits, region.axis, wide)                      # (N,)
        score = comm.all_reduce(logits.gather(1, at)[:, 0].to(wide) * mine, region.axis, "loss")
        for part, *rows in zip(*(x.split(_rows(logits, wide)) for x in (logits, total, at, mine, valid))):
            _softmax_minus_onehot(part, *rows)
        ctx.save_for_backward(kept, weight, logits)
        ctx.count, ctx.region, ctx.shape = count, region, whole.shape
        return (((total - score) * valid).sum(dtype=torch.float64) / count).to(wide)

    @staticmethod
    def backward(ctx, upstream):
        (kept, weight, grad), scale = ctx.saved_tensors, upstream / (ctx.count * RAISED)
        into, wanted, *_ = needed(ctx)
        whole = ctx.region.again(kept, "ends") if wanted else None
        sent, d_weight = comm.Pending(), None
        if into:
            d_hidden = (grad @ weight).mul_(scale)                           # (N, C), my part of the sum
            sent = ctx.region.back(d_hidden.view(ctx.shape), "ends")
        if whole:
            d_weight = grad.T @ (whole.wait().flatten(0, -2) * scale)        # (V/t, C)
        return sent.wait(), d_weight, None, None, None, None


def _log_sum_exp(logits, axis, wide):
    """log sum exp of each row (N, V/t), over all ranks' columns: (N,). Less the maximum, or exp overflows."""
    mine = torch.cat([part.to(wide).logsumexp(1) for part in logits.split(_rows(logits, wide))])
    top = comm.all_reduce(mine.clone(), axis, "loss", op="max")
    return comm.all_reduce((mine - top).exp_(), axis, "loss").log_().add_(top)


def _softmax_minus_onehot(logits, total, at, mine, valid):
    """Overwrite `logits` (rows, V/t) by d loss / d logits, times RAISED."""
    p = (logits.to(total.dtype) - total[:, None]).exp_()                     # (rows, V/t)
    p.scatter_add_(1, at, -mine[:, None].to(p.dtype))
    logits.copy_(p.mul_(valid[:, None] * RAISED))


def _rows(logits, wide):
    return max(1, ROWS_BYTES // (max(1, logits.shape[1]) * wide.itemsize))
