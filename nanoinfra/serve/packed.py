"""Weights in the order that the CPU's matrix units read: packed once, and together what reads one input.

At a few tokens a step, a product costs the reading of its weights, 2 Psi bytes in bf16 for all of them; plain
linears arrange them anew each time. q, k and v become one product, and so do gate and up. For a server on one
rank: the plain weights are given up, all but the embedding's.

oneDNN compiles a product anew for each number of rows, which takes longer than the product, and keeps what it
compiled, up to 1 MB each. A server's steps are of any size; so rows are filled up to one of 8 numbers an
octave, and `warm` has these compiled before the first request.
"""
import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.model.decoder import Decoder

DTYPES = torch.bfloat16, torch.float32
TOKENS = 32                                  # in a call: what the layout is chosen for


class Packed(nn.Module):
    """What `linears` make of one input, (..., in) -> (..., sum of their outs). Not for training."""

    def __init__(self, *linears: nn.Module):
        super().__init__()
        self.outs = [len(linear.weight) for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])               # (outs, in)
        biases = [bias.detach() for linear in linears if (bias := getattr(linear, "bias", None)) is not None]
        self.bias = torch.cat(biases) if biases else None
        self.like = weight[:1].clone()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def _product(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def filled(rows: int) -> int:
    """The least number from `rows` on that has at most four binary digits before its zeros."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def pack(model: Decoder) -> None:
    """Let every product of `model`, filled and on the CPU in one of DTYPES, read packed weights."""
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.qkv, attn.o = _together(attn.q, attn.k, attn.v), Packed(attn.o)
        mlp.gate_up, mlp.down = _together(*filter(None, (mlp.gate, mlp.up))), Packed(mlp.down)
        attn.read, mlp.read = attn.qkv.read, mlp.gate_up.read
    model.head = Packed(model.head)


def warm(model: Decoder, most: int, seats: int) -> None:
    """Steps of up to `most` tokens, `seats` of which give a next one, find all compiled. Layers are alike."""
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for product in (attn.qkv, attn.o, mlp.gate_up, mlp.down):
        product.warm(most)
    model.head.warm(seats)


def _together(*linears):
    """All in one; the plain weights, of which nobody makes use any more, are let go."""
    packed = Packed(*linears)
    for linear in linears:
        linear.weight = linear.bias = None
    return packed
