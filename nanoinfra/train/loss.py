"""Cross-entropy, normalised once: the sum over this rank's targets / the valid targets of the whole step.

The head's product and the loss are one function: the logits are overwritten, a few rows at a time, by their
own gradient softmax - onehot, so that of N x V numbers one copy is held and softmax stays in cache.
Gradients then only need summing, over micro-batches and over ranks. Fused heads: Liger (Hsu et al. 2024).
N rows (B T of them), C width, V vocabulary.
"""
import torch
from torch import nn

from nanoinfra.data.source import IGNORE
from nanoinfra.dist import comm

ROWS_BYTES = 2 << 20                         # of logits worked on at a time: what a core's cache holds


def count_valid(micro_batches, axis, *flags: int) -> list[int]:
    """[valid targets of the whole step on all ranks, *flags summed]: the one integer all-reduce of a step."""
    valid = sum(int((y != IGNORE).sum()) for _, y in micro_batches)
    return comm.all_reduce(torch.tensor([valid, *flags]), axis, "scalars").tolist()


class HeadLoss(nn.Module):
    """The head and its loss as one module, so that who hooks modules sees the head's weight in use."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        """As `cross_entropy`."""
        return cross_entropy(hidden, self.head.weight, targets, count)


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                  count: int) -> torch.Tensor:
    """-sum log p(target) / count, over targets that are not IGNORE; softmax in at least float32.

    `hidden` (B, T, C) is what the head reads, `weight` (V, C) the head's, `targets` (B, T).
    Returns () in the wide dtype: this rank's share of the step's mean loss.
    """
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), max(1, count))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, count):
        logits = hidden @ weight.T                                           # (N, V), becomes its gradient
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = torch.zeros((), dtype=torch.float64, device=logits.device)
        rows = max(1, ROWS_BYTES // (logits.shape[1] * wide.itemsize))
        for part, target in zip(logits.split(rows), targets.split(rows)):
            loss += _softmax_minus_onehot(part, target, wide)
        ctx.save_for_backward(hidden, weight, logits)
        ctx.count = count
        return (loss / count).to(wide)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, grad = ctx.saved_tensors
        scale = upstream / ctx.count
        d_hidden = (grad @ weight) * scale if ctx.needs_input_grad[0] else None       # (N, C)
        d_weight = (grad.T @ hidden) * scale if ctx.needs_input_grad[1] else None     # (V, C)
        return d_hidden, d_weight, None, None


def _softmax_minus_onehot(logits, target, wide):
    """Overwrite `logits` (rows, V) by d loss / d logits; returns the summed loss of the rows."""
    valid = target != IGNORE
    at = target.where(valid, 0)[:, None]                                     # (rows, 1)
    p = torch.log_softmax(logits, -1, dtype=wide)                            # (rows, V)
    loss = -(p.gather(1, at)[:, 0] * valid).sum(dtype=torch.float64)
    p.exp_()
    p.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide))
    logits.copy_(p.mul_(valid[:, None]))
    return loss
