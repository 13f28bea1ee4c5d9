"""Test cases of lesson 07: inputs, the results of one rank, and those of usual mistakes.

`bare`, `step` and `score` run what is judged inside each of n ranks.
"""
import functools
from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoinfra.distributed.mesh import Mesh, world_size

B, T, C, HIDDEN, VOCAB, ROWS = 2, 3, 7, 12, 11, 6            # C > D/t; a vocabulary that no number divides
NAMES = ("up", "up_bias", "down", "down_bias")
CUT = {"up": 0, "up_bias": 0, "down": 1}                     # along which dim
TARGETS = torch.tensor([0, 10, 3, 7, 5, 9])                  # in every rank's columns, first and last too
LAST = torch.tensor([9, 10, 10, 9, 9, 10])                   # all in the last rank's


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
    """All of them (R, V), which no rank may have."""
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
def alone(rank: int, n: int, times: int = 1) -> dict[str, torch.Tensor]:
    """Output without down's bias, and x's gradient, of this rank's part alone, for x `times` as large."""
    x = times * inputs().requires_grad_()
    x.retain_grad()
    y = _mlp(x, *(part(name, rank, n) for name in NAMES[:3]))
    y.backward(upstream())
    return {"y": y.detach(), "x": x.grad}


def partial(rank: int, seed: int) -> torch.Tensor:
    """(T, C), another on each rank: what f and g are given by themselves."""
    return drawn((T, C), 100 * seed + rank)


@functools.cache
def output_slips(n: int) -> dict[str, torch.Tensor]:
    """{cause: y (B, T, C), the same on all ranks}."""
    want, bias = one_rank()["y"], weights()["down_bias"]
    up, up_bias, down = list(weights().values())[:3]
    late = F.gelu(F.linear(F.linear(inputs(), up, up_bias), down))
    tanh = _mlp(inputs(), *weights().values(), functools.partial(F.gelu, approximate="tanh"))
    return {"down's bias from every rank? Add it once, to the sum": want + (n - 1) * bias,
            "no bias of down's?": want - bias,
            "divided by t? g is a sum, no mean": (want - bias) / n + bias, "g is a sum, no mean": want / n,
            "GELU comes between the two matrices, not after g": late + bias,
            "GELU after the bias? It comes between the two matrices": F.gelu(
                F.linear(F.linear(inputs(), up, up_bias), down, bias)),
            "GELU's approximation by tanh? Plain F.gelu": tanh}


def share_slips(name: str, rank: int, n: int) -> dict[str, torch.Tensor]:
    """{cause: what `share` gives after the slip}."""
    whole = weights()[name]
    if name not in CUT:
        why = "the bias of down is added to the sum, after g: every rank has it, whole"
        return {why: whole / n, f"{why}, no zeros": torch.zeros_like(whole)}
    places = torch.arange(rank, whole.shape[CUT[name]], n)
    return {f"dealt out one by one? A stretch is {whole.shape[CUT[name]] // n} neighbours":
            whole.index_select(CUT[name], places)}


def mlp_grad_slips(name: str, rank: int, n: int, want: torch.Tensor) -> dict[str, torch.Tensor]:
    """{cause: gradient of `name`}."""
    if name == "down_bias":
        return {"bias/t inside g? Add the bias to the sum, after g": want / n,
                "the bias went through f? It is added to the sum, whose gradient is whole": want * n}
    if name != "x":
        return {"does g sum in backward, too? That gradient is whole": want * n, "divided by t?": want / n}
    return {"your part alone: the backward of f is an all-reduce": alone(rank, n)["x"],
            "summed twice: f once, where up reads x": want * n} if n > 1 else {}


@functools.cache
def one_loss(targets: torch.Tensor = TARGETS) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss (R,), its gradient (R, V)) of one rank that has all logits."""
    leaf = logits().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="none")
    loss.sum().backward()
    return loss.detach(), leaf.grad


@functools.cache
def loss_slips(n: int) -> dict[str, torch.Tensor]:
    """{cause: loss (R,), the same on all ranks}."""
    whole = logits()
    picked, top, total = _picked(whole), whole.max(1).values, whole.logsumexp(1)
    own = whole.split(ceil(VOCAB / n), 1)
    z, shifted = [part - top[:, None] for part in own], [part - part.max(1, True).values for part in own]
    mixed = sum(part.exp().sum(1) for part in shifted).log()
    unmasked = [(part, TARGETS - columns(r, n).start) for r, part in enumerate(z)]
    first = sum(part.gather(1, at.where(_inside(at, part), 0)[:, None])[:, 0] for part, at in unmasked)
    nearest = sum(part.gather(1, at.clamp(0, part.shape[1] - 1)[:, None])[:, 0] for part, at in unmasked)
    even = sum(_hit(part, TARGETS - r * (VOCAB // n)) for r, part in enumerate(z))
    return {"each rank takes its own maximum away? The sums need one in common": mixed + top - picked,
            "your own maximum taken off? Take off that of all ranks": mixed - _picked(torch.cat(shifted, 1)),
            "log of the sum alone: less the target's logit": total, "the maximum, back on top?": total - top,
            "less the maximum in one of the two only?": total - top - picked,
            "column 0 of ranks that do not own the target counts, too? Times 0": total - top - first,
            "another column of ranks that do not own the target counts, too? Times 0": total - top - nearest,
            "rank * (V // t)? Your columns begin at `start`": total - top - even}


@functools.cache
def own_slips(rank: int, n: int) -> dict[str, torch.Tensor]:
    """{cause: the loss (R,) that differs from rank to rank}."""
    whole = logits()
    picked, top, own = _picked(whole), whole.max(1).values, whole.split(ceil(VOCAB / n), 1)
    local, total = TARGETS - columns(rank, n).start, whole.logsumexp(1)
    z, biggest = own[rank] - top[:, None], own[rank].max(1).values
    mixed = sum((part - part.max(1, True).values).exp().sum(1) for part in own).log()
    column0 = z.gather(1, local.where(_inside(local, z), 0)[:, None])[:, 0]
    return {"of your own columns alone: sum over the ranks": own[rank].logsumexp(1) - picked,
            "nothing summed over the ranks?": own[rank].logsumexp(1) - _hit(own[rank], local),
            "your own maximum? The sums need one in common": mixed + biggest - picked,
            "one rank knows the target's logit: sum it over the ranks": total - top - _hit(z, local),
            "one rank knows the target's logit, less the maximum: sum it": total - _hit(own[rank], local),
            "column 0 where the target is another rank's: times 0, then sum it": total - top - column0}


def grad_slips(rank: int, n: int) -> dict[str, torch.Tensor]:
    """{cause: gradient (R, V/n)}."""
    at = columns(rank, n)
    want, local = one_loss()[1][:, at], TARGETS - at.start
    mine = _inside(local, want)
    softmax, astray, nearest = want + F.one_hot(TARGETS, VOCAB)[:, at], want.clone(), want.clone()
    astray[~mine, 0] -= 1
    local_softmax = want - softmax + logits()[:, at].softmax(1)
    nearest.scatter_add_(1, local.clamp(0, want.shape[1] - 1)[:, None], (mine.double() - 1)[:, None])
    return {"softmax alone? Less 1 at the target": softmax,
            "1 taken off in my first column for targets of other ranks": astray,
            "1 taken off in my nearest column for targets of other ranks": nearest,
            "softmax over your own columns? Divide by the sum over all": local_softmax,
            "of the rows' mean? The caller divides": want / ROWS}


class Largest(TorchDispatchMode):
    """While it is on, `found` is the largest tensor that any operator made."""

    def __init__(self):
        super().__init__()
        self.found = torch.empty(0)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.found = max([self.found, *made], key=torch.Tensor.numel)
        return out


def bare(n: int, subject: Callable) -> dict:
    """f or g by itself, on what is another tensor on each rank."""
    mesh = Mesh(tp=n, pp=world_size() // n)
    x, gradient = (partial(mesh.tp.rank, seed) for seed in range(2))
    leaf = x.clone().requires_grad_()
    given = leaf * 1                                                   # a leaf might refuse to be overwritten
    y = getattr(subject, "apply", subject)(given, mesh.tp)
    forward, given = y.detach().clone(), given.detach().clone()
    back, = torch.autograd.grad(y, leaf, gradient)
    return {"input": given, "gradient": gradient, "forward": forward, "backward": back}


def step(n: int, subject: Callable) -> dict:
    """The MLP forward and backward: output, gradients, the ledger's rows each way, the largest tensor."""
    mesh = Mesh(tp=n, pp=world_size() // n)
    leaves = {name: part(name, mesh.tp.rank, n).clone().requires_grad_() for name in NAMES}
    x = inputs().requires_grad_()
    with Largest() as largest:
        y = subject(x, *leaves.values(), mesh.tp)
        rows = [mesh.comm_log.take_records()]
        if isinstance(y, torch.Tensor):
            y.backward(upstream())
            y = y.detach()
    grads = {name: leaf.grad for name, leaf in {"x": x, **leaves}.items()}
    rows.append(mesh.comm_log.take_records())
    return {"y": y, "grads": grads, "rows": rows, "largest": _shape(largest)}


def score(n: int, subject: Callable, shift: float = 0.0, targets: torch.Tensor = TARGETS) -> dict:
    """The loss of logits near `shift`: loss, gradient, what it was given, rows, the largest tensor."""
    mesh = Mesh(tp=n, pp=world_size() // n)
    at = columns(mesh.tp.rank, n)
    part, targets = (logits() + shift)[:, at].clone(), targets.clone()
    with Largest() as largest:
        found = subject(part, targets, at.start, mesh.tp)
    loss, grad = found if isinstance(found, tuple | list) and len(found) == 2 else (found, None)
    return {"loss": loss, "grad": grad, "given": (part, targets), "rows": mesh.comm_log.take_records(),
            "largest": _shape(largest)}


def _shape(largest):
    return largest.found.detach().to("meta")


def _picked(whole):
    """The targets' logits, (R,)."""
    return whole.gather(1, TARGETS[:, None])[:, 0]


def _inside(local, part):
    return (local >= 0) & (local < part.shape[1])


def _hit(part, local):
    """The target's number where `part` (R, V/n) has it, else 0: (R,)."""
    mine = _inside(local, part)
    return part.gather(1, local.where(mine, 0)[:, None])[:, 0] * mine


def _mlp(x, up, up_bias, down, down_bias=None, act=F.gelu):
    return F.linear(act(F.linear(x, up, up_bias)), down, down_bias)
