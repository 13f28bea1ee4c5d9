"""What lesson 07's checks are judged on, and what one rank makes of it, rightly and after the usual slips."""
import functools
from math import ceil

import torch
import torch.nn.functional as F

B, T, C, HIDDEN, VOCAB, ROWS = 2, 3, 5, 12, 11, 6            # a vocabulary that no number of ranks divides
NAMES = ("up", "up_bias", "down", "down_bias")
CUT = {"up": 0, "up_bias": 0, "down": 1}                     # along which dim
TARGETS = torch.tensor([0, 10, 3, 7, 5, 9])                  # in every rank's columns, first and last too


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers in float64, the same for everyone who asks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs() -> torch.Tensor:
    """x (B, T, C)."""
    return drawn((B, T, C), 10)


def upstream() -> torch.Tensor:
    """The gradient (B, T, C) that comes back to y."""
    return drawn((B, T, C), 11)


def logits() -> torch.Tensor:
    """All of them (N, V), which no rank may have."""
    return 3 * drawn((ROWS, VOCAB), 12)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """The whole MLP, by name."""
    shapes = (HIDDEN, C), (HIDDEN,), (C, HIDDEN), (C,)
    return {name: drawn(shape, seed) for seed, (name, shape) in enumerate(zip(NAMES, shapes))}


def part(name: str, rank: int, n: int, whole: torch.Tensor | None = None) -> torch.Tensor:
    """What `rank` of `n` has of the parameter `name`, or of its gradient `whole`."""
    whole = weights()[name] if whole is None else whole
    return whole.chunk(n, CUT[name])[rank] if name in CUT else whole


def columns(rank: int, n: int) -> slice:
    """The columns of the vocabulary that `rank` of `n` has: ceil(V/n), the last rank fewer."""
    return slice(rank * ceil(VOCAB / n), min(VOCAB, (rank + 1) * ceil(VOCAB / n)))


@functools.cache
def one_rank() -> dict:
    """Output, and gradients by name, of the whole MLP."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in {"x": inputs(), **weights()}.items()}
    y = _mlp(*leaves.values())
    y.backward(upstream())
    return {"y": y.detach(), "grads": {name: leaf.grad for name, leaf in leaves.items()}}


@functools.cache
def alone(rank: int, n: int) -> dict[str, torch.Tensor]:
    """Output without down's bias, and x's gradient, of this rank's part alone."""
    x = inputs().requires_grad_()
    y = _mlp(x, *(part(name, rank, n) for name in NAMES[:3]))
    y.backward(upstream())
    return {"y": y.detach(), "x": x.grad}


def _mlp(x, up, up_bias, down, down_bias=None):
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


@functools.cache
def one_loss() -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (N,), its gradient (N, V)) of one rank that has all logits."""
    leaf = logits().requires_grad_()
    loss = F.cross_entropy(leaf, TARGETS, reduction="none")
    loss.sum().backward()
    return loss.detach(), leaf.grad


@functools.cache
def loss_slips(n: int) -> dict[str, torch.Tensor]:
    """{cause: loss (N,)}."""
    whole = logits()
    picked, top, total = whole.gather(1, TARGETS[:, None])[:, 0], whole.max(1).values, whole.logsumexp(1)
    own = whole.split(ceil(VOCAB / n), 1)
    mixed = sum((part - part.max(1, True).values).exp().sum(1) for part in own).log() + top
    return {"each rank takes its own maximum away? The sums need one in common": mixed - picked,
            "log of the sum alone: less the target's logit": total, "the maximum, back on top?": total - top,
            "less the maximum in one of the two only?": total - top - picked}


@functools.cache
def own_slips(rank: int, n: int) -> dict[str, torch.Tensor]:
    """{cause: the loss (N,) that differs from rank to rank}."""
    whole = logits()
    picked, own = whole.gather(1, TARGETS[:, None])[:, 0], whole.split(ceil(VOCAB / n), 1)
    mixed = sum((part - part.max(1, True).values).exp().sum(1) for part in own).log()
    return {"of your own columns alone: sum over the ranks": own[rank].logsumexp(1) - picked,
            "your own maximum? The sums need one in common": mixed + own[rank].max(1).values - picked}


def grad_slips(rank: int, n: int) -> dict[str, torch.Tensor]:
    """{cause: gradient (N, V/n)}."""
    at = columns(rank, n)
    want, local = one_loss()[1][:, at], TARGETS - at.start
    softmax, astray = want + F.one_hot(TARGETS, VOCAB)[:, at], want.clone()
    astray[(local < 0) | (local >= want.shape[1]), 0] -= 1
    return {"softmax alone? Less 1 at the target": softmax,
            "1 taken off in my first column for targets of other ranks": astray,
            "of the rows' mean? The caller divides": want / ROWS}
