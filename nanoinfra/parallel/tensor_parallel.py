"""Tensor parallelism: the matrices of a block are sharded over the axis, and one sum completes each half.

    column-parallel (q, k, v; gate, up)  sharded along outputs   f: nothing forward, an all-reduce backward
    row-parallel    (o; down)            sharded along inputs    g: an all-reduce forward, nothing backward
So 4 all-reduces of B T C a layer and micro-batch, 8 (t-1)/t BTC elements a rank. Shoeybi et al. 2019
(Megatron-LM), section 3. Composes with everything: other techniques only see smaller parameters. A region
(this one, or sequence_parallel.py's) says how hidden states lie on the ranks outside of the sharded matrices.
B sequences, T tokens, C width, D outputs of a matrix, t ranks.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import AsyncCollective
from nanoinfra.distributed.mesh import MeshAxis


class TensorParallelRegion:
    """Plain tensor parallelism: every rank has the hidden states of all tokens, (B, T, C)."""

    def __init__(self, axis: MeshAxis):
        self.axis = axis

    def column_parallel_linear(self, x: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
        """The outputs (B, T, D/t) of column-parallel `linears` (D/t, C) for hidden states `x`."""
        return column_parallel_linear(self, x, *linears)

    def row_parallel_linear(self, y: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        """The hidden states that row-parallel `linear` (C, D/t) makes of `y` (B, T, D/t)."""
        return row_parallel_linear(self, y, linear)

    def reduce_from_region(self, y: torch.Tensor, tag: str = "layers") -> torch.Tensor:
        """g, with its backward: sum the ranks' partial outputs `y` (B, T, C). Overwrites y."""
        return _ReduceFromRegion.apply(y, self, tag)

    def set_seq_len(self, seq_len: int) -> None:
        """Set the tokens of a sequence, which only sequence parallelism needs."""

    def local_seq_len(self, seq_len: int) -> int:
        """Tokens of a sequence of `seq_len` whose hidden states this rank holds."""
        return seq_len

    def gather_input(self, x: torch.Tensor, tag: str) -> tuple[torch.Tensor, torch.Tensor]:
        """f forward: (the input of all tokens for the matrices, what of it is saved for backward)."""
        return x, x

    def regather_input(self, saved: torch.Tensor, tag: str) -> AsyncCollective:
        """In backward: the input of all tokens once more, from what was saved."""
        return AsyncCollective(saved)

    def reduce_input_grad(self, grad: torch.Tensor, tag: str) -> AsyncCollective:
        """f backward: sum the ranks' partial gradients of the input (B, T, C). Overwrites grad."""
        return comm.all_reduce(grad, self.axis, tag, async_op=True)

    def reduce_output(self, y: torch.Tensor, tag: str) -> torch.Tensor:
        """g forward: sum the ranks' partial outputs (B, T, C). Overwrites y."""
        return comm.all_reduce(y, self.axis, tag)

    def gather_output_grad(self, grad: torch.Tensor, tag: str) -> torch.Tensor:
        """g backward: the output's gradient for all tokens (B, T, C)."""
        return grad


def column_parallel_linear(region: TensorParallelRegion, x: torch.Tensor, *linears: nn.Module,
                           tag: str = "layers") -> list[torch.Tensor]:
    """Apply each of `linears` to the region's hidden states `x`; backward has one collective for them all."""
    biases = [linear.bias for linear in linears]
    return list(_ColumnParallelLinear.apply(region, tag, x, *(linear.weight for linear in linears), *biases))


def row_parallel_linear(region: TensorParallelRegion, y: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Apply `linear`, sharded along its inputs (C, D/t): sum the ranks' outputs, then add the bias once.

    This rank's `y` (B, T, D/t) to hidden states (B, T, C), or this rank's tokens of them.
    """
    out = region.reduce_from_region(F.linear(y, linear.weight))              # (B, T, C)
    return out if linear.bias is None else out + linear.bias


class _ColumnParallelLinear(torch.autograd.Function):
    """In backward the input's gradient is reduced while the weights' gradients are computed."""

    @staticmethod
    def forward(ctx, region, tag, x, *weights_and_biases):
        n = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:n], weights_and_biases[n:]
        full_input, saved = region.gather_input(x, tag)
        ctx.region, ctx.tag = region, tag
        ctx.save_for_backward(saved, *weights)
        return tuple(F.linear(full_input, w, b) for w, b in zip(weights, biases))     # (B, T, D/t)

    @staticmethod
    def backward(ctx, *grads):
        (saved, *weights), n = ctx.saved_tensors, len(grads)
        _, _, needs_input, *needed = inputs_needing_grad(ctx)
        needed_weights, needed_biases = needed[:n], needed[n:]
        shape, grads = grads[0].shape, [grad.reshape(-1, grad.shape[-1]) for grad in grads]   # (B T, D/t)
        gathered = ctx.region.regather_input(saved, ctx.tag) if any(needed_weights) else None
        d_input = AsyncCollective()
        if needs_input:
            partial = grads[0] @ weights[0]                                  # (B T, C), this rank's part
            for grad, weight in zip(grads[1:], weights[1:]):
                partial.addmm_(grad, weight)
            d_input = ctx.region.reduce_input_grad(partial.view(*shape[:-1], -1), ctx.tag)
        rows = gathered.wait().reshape(-1, weights[0].shape[1]) if gathered else None         # (B T, C)
        d_weights = [grad.T @ rows if need else None for grad, need in zip(grads, needed_weights)]
        d_biases = [grad.sum(0) if need else None for grad, need in zip(grads, needed_biases)]
        return None, None, d_input.wait(), *d_weights, *d_biases


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, region, tag):
        ctx.region, ctx.tag = region, tag
        out = region.reduce_output(y, tag)
        if out is y:
            ctx.mark_dirty(y)
        return out

    @staticmethod
    def backward(ctx, grad):
        return ctx.region.gather_output_grad(grad, ctx.tag), None, None


def inputs_needing_grad(ctx) -> list[bool]:
    """Like `ctx.needs_input_grad`, but true only for what the running backward was asked for.

    `torch.autograd.backward(..., inputs=[...])` may ask for some of the inputs only.
    """
    nodes = iter([node for node, _ in ctx.next_functions if node is not None])
    return [need and torch._C._will_engine_execute_node(next(nodes)) for need in ctx.needs_input_grad]


def shard_linear(linear: nn.Module, dim: int, axis: MeshAxis) -> nn.Module:
    """Keep of `linear` (any module with a weight) only this rank's equal shard, in place.

    `dim` 0 shards the outputs, 1 the inputs. Raises ValueError where the axis does not divide that size.
    """
    size = linear.weight.shape[dim]
    if size % axis.size:
        raise ValueError(f"{axis.size} ranks cannot share {size} {'inputs' if dim else 'outputs'} evenly; "
                         f"give a width that {axis.size} divides")
    for key, p in list(linear._parameters.items()):
        if p is not None and (dim == 0 or key == "weight"):
            shard = p.detach().chunk(axis.size, dim)[axis.rank].clone()
            linear._parameters[key] = nn.Parameter(shard, p.requires_grad)
    return linear
