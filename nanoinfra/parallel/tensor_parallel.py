"""Tensor parallelism: the matrices of a block are cut over the axis, and one sum puts each half together.

    column-parallel (q, k, v; gate, up)  cut along outputs   f: nothing forward, an all-reduce backward
    row-parallel    (o; down)            cut along inputs    g: an all-reduce forward, nothing backward
So 4 all-reduces of B T C a layer and micro-batch, 8 (t-1)/t BTC elements a rank. Shoeybi et al. 2019
(Megatron-LM), section 3. Composes with everything: what other techniques see are smaller parameters. A
region (this one, or sequence.py's) says how the stream between the halves lies on the ranks.
B sequences, T tokens, C width, D outputs of a matrix, t ranks.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import Pending


class Whole:
    """The region of plain tensor parallelism: every rank has all of the stream, (B, T, C)."""

    def __init__(self, axis):
        self.axis = axis

    def read(self, x: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
        """What column-parallel `linears` (D/t, C) make of `x` (B, T, C): (B, T, D/t) each."""
        return read(self, x, *linears)

    def leave(self, y: torch.Tensor, tag: str = "layers") -> torch.Tensor:
        """g: the stream's share of `y` (B, T, C), of which every rank has a part of the sum. Overwrites y."""
        return _Leave.apply(y, self, tag)

    def share(self, tokens: int) -> int:
        """Rows of the stream on this rank for sequences of `tokens`. Say so where no embedding has."""
        return tokens

    def enter(self, x: torch.Tensor, tag: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(what matrices read, what is kept of it for backward)."""
        return x, x

    def again(self, kept: torch.Tensor, tag: str) -> Pending:
        """What matrices read, once more, of what was kept."""
        return Pending(kept)

    def back(self, grad: torch.Tensor, tag: str) -> Pending:
        """f's backward: the stream's gradient, of which every rank has a part of the sum. Overwrites grad."""
        return comm.all_reduce(grad, self.axis, tag, wait=False)

    def reduce(self, y: torch.Tensor, tag: str) -> torch.Tensor:
        """g's forward."""
        return comm.all_reduce(y, self.axis, tag)

    def spread(self, grad: torch.Tensor, tag: str) -> torch.Tensor:
        """g's backward."""
        return grad


class RowLinear(nn.Module):
    """`linear`, cut along its inputs (C, D/t): the sum over the ranks, then the bias, once."""

    def __init__(self, linear: nn.Linear, region):
        super().__init__()
        self.weight, self.bias, self.region = linear.weight, linear.bias, region

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (B, T, D/t), this rank's, to (B, T, C), or the region's share of it."""
        y = self.region.leave(F.linear(x, self.weight))                      # (B, T, C)
        return y if self.bias is None else y + self.bias


def read(region, x: torch.Tensor, *linears: nn.Module, tag: str = "layers") -> list[torch.Tensor]:
    """The products of `x`, as `region` has it, with each of `linears`; one collective back for them all."""
    biases = [linear.bias for linear in linears]
    return list(_Read.apply(region, tag, x, *(linear.weight for linear in linears), *biases))


class _Read(torch.autograd.Function):
    """In backward the input's gradient travels while the weights' gradients are computed."""

    @staticmethod
    def forward(ctx, region, tag, x, *weights_and_biases):
        n = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:n], weights_and_biases[n:]
        whole, kept = region.enter(x, tag)
        ctx.region, ctx.tag = region, tag
        ctx.save_for_backward(kept, *weights)
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases))  # (B, T, D/t)

    @staticmethod
    def backward(ctx, *grads):
        (kept, *weights), n = ctx.saved_tensors, len(grads)
        _, _, into, *wanted = needed(ctx)
        wanted, wanted_biases = wanted[:n], wanted[n:]
        shape, grads = grads[0].shape, [grad.reshape(-1, grad.shape[-1]) for grad in grads]   # (B T, D/t)
        whole, sent = ctx.region.again(kept, ctx.tag) if any(wanted) else None, Pending()
        if into:
            dx = grads[0] @ weights[0]                                       # (B T, C), my part of the sum
            for grad, weight in zip(grads[1:], weights[1:]):
                dx.addmm_(grad, weight)
            sent = ctx.region.back(dx.view(*shape[:-1], -1), ctx.tag)
        rows = whole.wait().reshape(-1, weights[0].shape[1]) if whole else None              # (B T, C)
        d_weights = [grad.T @ rows if w else None for grad, w in zip(grads, wanted)]
        d_biases = [grad.sum(0) if w else None for grad, w in zip(grads, wanted_biases)]
        return None, None, sent.wait(), *d_weights, *d_biases


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, region, tag):
        ctx.region, ctx.tag = region, tag
        out = region.reduce(y, tag)
        if out is y:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    def backward(ctx, grad):
        return ctx.region.spread(grad, ctx.tag), None, None


def needed(ctx) -> list[bool]:
    """`ctx.needs_input_grad` of the backward under way, which may have been asked for some inputs alone."""
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return [need and torch._C._will_engine_execute_node(next(nodes)) for need in ctx.needs_input_grad]


def cut(linear: nn.Module, dim: int, axis) -> nn.Module:
    """Leave `linear` (any module with a weight) its rank's equal share along `dim`: 0 outputs, 1 inputs.

    Raises ValueError where the ranks cannot share evenly.
    """
    size = linear.weight.shape[dim]
    if size % axis.size:
        raise ValueError(f"{axis.size} ranks cannot share {size} {'inputs' if dim else 'outputs'} evenly; "
                         f"give a width that {axis.size} divides")
    for key, p in list(linear._parameters.items()):
        if p is not None and (dim == 0 or key == "weight"):
            mine = p.detach().chunk(axis.size, dim)[axis.rank].clone()
            linear._parameters[key] = nn.Parameter(mine, p.requires_grad)
    return linear
