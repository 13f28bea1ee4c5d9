"""The parts between the matrix products: norms, rotary positions, the MLP.

LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.
RoPE (Su et al. 2021): pair j of a head turns by position * theta^(-2j/K), so that q.k sees distances alone.
SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)).
B sequences, T tokens, C width, F hidden width of the MLP, H heads, K head_dim.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.formulas.shape import ModelConfig


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


ACTIVATIONS = {"gelu": partial(F.gelu, approximate="tanh"), "relu": F.relu}


class MLP(nn.Module):
    """C -> F -> C. With `gate` (SwiGLU) the gate decides, per hidden unit, how much of `up` passes.

    `read` applies the linears that read the input; like attention's core it is an attribute.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_, bias = config.width, config.hidden, config.parts.bias
        self.gate = nn.Linear(C, F_, bias=bias) if config.parts.mlp == "swiglu" else None
        self.up = nn.Linear(C, F_, bias=bias)
        self.down = nn.Linear(F_, C, bias=bias)
        self.act = ACTIVATIONS.get(config.parts.mlp)
        self.read = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            up, = self.read(x, self.up)                                   # (B, T, F)
            return self.down(self.act(up))                                # (B, T, C)
        gate, up = self.read(x, self.gate, self.up)                       # (B, T, F) each
        return self.down(F.silu(gate) * up)                               # (B, T, C)


def rope_angles(positions: torch.Tensor, head_dim: int, theta: float,
                dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2j/K) for `positions` (T,) or (B, T).

    They come as (1, T, K/2) or (B, 1, T, K/2), ready to meet (B, H, T, K), in at least float32. So few
    numbers are taken anew at every call of the decoder; nothing is stored.
    """
    j = torch.arange(0, head_dim, 2, device=positions.device).to(wide(dtype))
    frequency = 1.0 / theta ** (j / head_dim)                             # (K/2,)
    angle = positions.unsqueeze(-2).unsqueeze(-1) * frequency             # (1, T, K/2) or (B, 1, T, K/2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (x[j], x[j + K/2]) of `x` (B, H, T, K) by their angles.

    The paper pairs neighbours, Hugging Face the two halves: the same but for the order of q's and k's rows.
    """
    cos, sin = rope
    a, b = x.to(cos.dtype).chunk(2, dim=-1)                               # (B, H, T, K/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
