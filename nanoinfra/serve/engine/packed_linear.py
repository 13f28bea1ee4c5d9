"""Linear layers of a server on one CPU rank: q, k, v as one product, gate and up as one, weights packed.

A product of a few rows costs the reading of its weights, 2 Psi bytes in bf16 for all of them. One row: `gemv`
of the kernels in C, from weights in the plain order. Several: oneDNN, from weights packed once in the order
that its matrix units read, where it packs this dtype (bf16: not with AVX2 alone); else torch's linear. Where
both are used the weights are in memory twice, except a tied head's. The two sum in different orders: outputs
differ in their last bits (bf16: 1 to 5 of 10,000, by 1/256), so greedy tokens may depend on who shares a
step.
"""
import functools
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.ports import (
    LinearPort,
    PortRow,
    check_bare_linears,
    check_ports,
    replace_ports,
    why_not_bare,
)
from nanoinfra.parallel.vocab_parallel import ParallelLMHead

PACKED_LINEAR_DTYPES = torch.bfloat16, torch.float32
_LAYOUT_ROWS = 32                            # rows of a call, for which oneDNN chooses the packed layout


class PackedLinear(nn.Module):
    """Several linears of one input as one product: (..., in) -> (..., sum of their outs). Not for training.

    `gemv` is the kernel in C, compiled for their dtype; None where there is no compiler.
    """

    def __init__(self, *linears: nn.Module, gemv: Callable | None = None):
        super().__init__()
        self.outs = [len(linear.weight) for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        biases = [bias.detach() for linear in linears if (bias := getattr(linear, "bias", None)) is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()     # (outs, in)
        self.bias = torch.cat(biases) if biases else None
        self.total_out, self.total_in = weight.shape
        self.row = weight[:1].clone()                                    # an input to warm up with
        self.packed = None if why_onednn_cannot_pack(weight.dtype) else _reorder(weight)
        self.gemv, self.weight = gemv, None if gemv is None and self.packed is not None else weight
        self.pointers = [part if part is None else part.data_ptr() for part in (self.weight, self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gemv and x.numel() == self.total_in:
            return self._one_row(x.contiguous())
        rows = x.shape[:-1].numel()
        padding = round_up_rows(rows) - rows
        if padding:
            y = self._product(F.pad(x.reshape(rows, -1), (0, 0, 0, padding)))
            return y[:rows].view(*x.shape[:-1], -1)
        return self._product(x)

    def warm_up(self, max_rows: int) -> None:
        """Compute once with every number of rows up to `max_rows`, so that oneDNN has compiled them all."""
        for rows in sorted({round_up_rows(rows) for rows in range(1, max_rows + 1)}):
            self._product(self.row.expand(rows, -1).contiguous())

    def _one_row(self, x):
        y = x.new_empty(*x.shape[:-1], self.total_out)
        self.gemv(y.data_ptr(), x.data_ptr(), *self.pointers, self.total_in, self.total_out)
        return y

    def _product(self, x):
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@functools.cache
def why_onednn_cannot_pack(dtype: torch.dtype) -> str:
    """Why oneDNN packs no weights of `dtype` on this CPU; an empty string where it does."""
    try:
        _reorder(torch.zeros(1, 1, dtype=dtype))
    except (RuntimeError, AttributeError) as error:          # a torch without oneDNN has no such operation
        return str(error).partition("\n")[0]
    return ""


def _reorder(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)


def round_up_rows(rows: int) -> int:
    """The least number from `rows` on with at most four binary digits before its zeros: 8 numbers an octave.

    oneDNN compiles a product anew for each number of rows, which takes longer than the product itself, and
    keeps what it compiled, up to 1 MB each. So steps are padded to these numbers of rows.
    """
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


class PackedPort(LinearPort):
    """A port that applies the linears it was made of by one packed product, and other ones plainly.

    Their plain weights, which nothing uses any more, are let go.
    """

    def __init__(self, *linears: nn.Linear, gemv: Callable | None = None):
        self.product, self.linears = PackedLinear(*linears, gemv=gemv), linears
        for linear in linears:
            linear.weight = linear.bias = None

    def why_not_taken(self, linear: nn.Module) -> str:
        """Why this port, which has the weights that its linears had, must not be given `linear`."""
        if not any(linear is own for own in self.linears):
            return f"it is not the linear whose weights {self} has packed"
        return why_not_bare(linear, str(self))


class PackedInPort(PackedPort):
    """q, k and v, or gate and up, as one product."""

    def __call__(self, x: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
        if linears == self.linears:
            return list(self.product(x).split(self.product.outs, -1))
        return [linear(x) for linear in linears]


class PackedOutPort(PackedPort):
    """The packed product of o, or of down."""

    def __call__(self, y: torch.Tensor, linear: nn.Module) -> torch.Tensor:
        return self.product(y) if linear is self.linears[0] else linear(y)


def pack_linears(model: Decoder, gemv: Callable | None = None) -> list[PortRow]:
    """Pack every linear of `model`, on the CPU in one of PACKED_LINEAR_DTYPES; returns `check_ports`' table.

    Packed ports replace the plain ones, and a PackedLinear the head. Raises TypeError, and packs nothing,
    where a linear is wrapped or has a child that no port applies.
    """
    check_bare_linears(model, "packing")
    if reason := why_not_bare(model.head, "packing", (nn.Linear, ParallelLMHead)):
        raise TypeError(f"head: {reason}")
    replace_ports(model, partial(PackedInPort, gemv=gemv), partial(PackedOutPort, gemv=gemv))
    model.head = PackedLinear(model.head, gemv=gemv)
    return check_ports(model)


def warm_up_linears(model: Decoder, max_num_batched_tokens: int, max_num_seqs: int) -> None:
    """Let oneDNN compile the products of all steps of these sizes before the first request comes.

    All layers have the same shapes, so the first one is enough.
    """
    for row in check_ports(model.blocks[0]):
        row.chain[-1].product.warm_up(max_num_batched_tokens)
    model.head.warm_up(max_num_seqs)
