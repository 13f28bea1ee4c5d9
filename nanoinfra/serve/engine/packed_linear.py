"""A server's products on one CPU rank: q, k and v as one, gate and up as one, each row by who is fastest.

At a few tokens a step a product costs the reading of its weights, 2 Psi bytes in bf16 for all of them. Of one
row: `gemv` of decode.c, from weights in the plain order. Of more: oneDNN, from weights packed once in the
order that its matrix units read, where it packs this dtype (bf16: not with AVX2 alone); else torch's linear.
So where both are at hand the weights lie in memory twice, all but a tied head's.
The two sum in different orders: nearly every output differs in float32, in its last bits; in bf16 1 to 5 of
10,000 do, by 1/256. So there a request's greedy tokens may depend on who is computed beside it.

oneDNN compiles a product anew for each number of rows, which takes longer than the product, and keeps what it
compiled, up to 1 MB each. A server's steps are of any size; so rows are filled up to one of 8 numbers an
octave, and `warm` has these compiled before the first request.
"""
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.model.decoder import Decoder

DTYPES = torch.bfloat16, torch.float32
TOKENS = 32                                  # in a call: what the layout is chosen for


class Packed(nn.Module):
    """What `linears` make of one input, (..., in) -> (..., sum of their outs). Not for training.

    `gemv`: that of decode.c, compiled for their dtype; None where there is no compiler.
    """

    def __init__(self, *linears: nn.Module, gemv: Callable | None = None):
        super().__init__()
        self.outs = [len(linear.weight) for linear in linears]
        weights = [linear.weight.detach() for linear in linears]
        biases = [bias.detach() for linear in linears if (bias := getattr(linear, "bias", None)) is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()     # (outs, in)
        self.bias = torch.cat(biases) if biases else None
        self.total, self.ins = weight.shape
        self.like = weight[:1].clone()
        self.packed = None if unpackable(weight.dtype) else _packed(weight)
        self.gemv, self.weight = gemv, None if gemv is None and self.packed is not None else weight
        self.at = [part if part is None else part.data_ptr() for part in (self.weight, self.bias)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gemv and x.numel() == self.ins:
            return self._row(x.contiguous())
        rows = x.shape[:-1].numel()
        more = filled(rows) - rows
        if more:
            y = self._product(F.pad(x.reshape(rows, -1), (0, 0, 0, more)))
            return y[:rows].view(*x.shape[:-1], -1)
        return self._product(x)

    def read(self, x: torch.Tensor, *_: nn.Module) -> tuple[torch.Tensor, ...]:
        """The same, each linear's apart: takes the place of an attention's or an MLP's `read`."""
        return self(x).split(self.outs, -1)

    def warm(self, most: int) -> None:
        """Compute once with every number of rows up to `most`."""
        for rows in sorted({filled(rows) for rows in range(1, most + 1)}):
            self._product(self.like.expand(rows, -1).contiguous())

    def _row(self, x):
        y = x.new_empty(*x.shape[:-1], self.total)
        self.gemv(y.data_ptr(), x.data_ptr(), *self.at, self.ins, self.total)
        return y

    def _product(self, x):
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@functools.cache
def unpackable(dtype: torch.dtype) -> str:
    """Why oneDNN packs no weights of `dtype` on this CPU; empty where it does."""
    try:
        _packed(torch.zeros(1, 1, dtype=dtype))
    except (RuntimeError, AttributeError) as error:          # a torch without oneDNN has no such operation
        return str(error).partition("\n")[0]
    return ""


def _packed(weight):
    return torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)


def filled(rows: int) -> int:
    """The least number from `rows` on that has at most four binary digits before its zeros."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def pack(model: Decoder, gemv: Callable | None = None) -> None:
    """Let every product of `model`, filled and on the CPU in one of DTYPES, be a Packed one."""
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.o = _together(gemv, attn.q, attn.k, attn.v), Packed(attn.o, gemv=gemv)
        mlp.gate_up = _together(gemv, *filter(None, (mlp.gate, mlp.up)))
        mlp.down = Packed(mlp.down, gemv=gemv)
        attn.read, mlp.read = attn.qkv.read, mlp.gate_up.read
    model.head = Packed(model.head, gemv=gemv)


def warm(model: Decoder, most: int, seats: int) -> None:
    """Steps of up to `most` tokens, `seats` of which give a next one, find all compiled. Layers are alike."""
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for product in (attn.qkv, attn.o, mlp.gate_up, mlp.down):
        product.warm(most)
    model.head.warm(seats)


def _together(gemv, *linears):
    """All in one; the plain weights, of which nobody makes use any more, are let go."""
    packed = Packed(*linears, gemv=gemv)
    for linear in linears:
        linear.weight = linear.bias = None
    return packed
