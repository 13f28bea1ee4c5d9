"""The parts between the matrix products: norms and the MLP.

LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.
SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)). GELU: exact, or by tanh as in GPT-2.
B sequences, T tokens, C width, F hidden width of the MLP.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.config import ModelConfig


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum, divide and take angles in: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; the root mean square is taken in at least float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def make_norm(config: ModelConfig) -> nn.Module:
    """The family's norm over C. (torch's layer_norm, too, sums in float32 for bf16.)"""
    if config.parts.norm == "layer":
        return nn.LayerNorm(config.width, eps=config.eps)
    return RMSNorm(config.width, config.eps)


def apart(x: torch.Tensor, *linears: nn.Module) -> list[torch.Tensor]:
    """What each of `linears` makes of `x`."""
    return [linear(x) for linear in linears]


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
               "relu": F.relu}


class MLP(nn.Module):
    """C -> F -> C. With a `gate` (SwiGLU) it decides, per hidden unit, how much of `up` passes.

    `read` applies the linears that read the input; like attention's core it is an attribute.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_, bias = config.width, config.hidden, config.has_bias
        self.gate = nn.Linear(C, F_, bias=bias("gate")) if config.parts.gated else None
        self.up = nn.Linear(C, F_, bias=bias("up"))
        self.down = nn.Linear(F_, C, bias=bias("down"))
        self.act = ACTIVATIONS[config.act]
        self.read = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            up, = self.read(x, self.up)                                   # (B, T, F)
            return self.down(self.act(up))                                # (B, T, C)
        gate, up = self.read(x, self.gate, self.up)                       # (B, T, F) each
        return self.down(self.act(gate) * up)                             # (B, T, C)
