"""The layers of a decoder block besides attention: norms and the MLP.

LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight.
SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x)). GELU: exact, or by tanh as in GPT-2.
B sequences, T tokens, C width, F hidden width of the MLP.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.model.ports import PlainInPort, PlainOutPort


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype for sums, divisions and angles (mixed precision)."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim; the root mean square is computed in at least float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(at_least_float32(x.dtype))
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def make_norm(config: ModelConfig) -> nn.Module:
    """A LayerNorm or RMSNorm over C, as the family has it. (torch's layer_norm sums bf16 in float32 too.)"""
    if config.architecture.norm_type == "layer":
        return nn.LayerNorm(config.width, eps=config.eps)
    return RMSNorm(config.width, config.eps)


_ACTIVATION_FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
                         "relu": F.relu}


class MLP(nn.Module):
    """The feed-forward layer, C -> F -> C. A gated MLP (SwiGLU) scales each hidden unit of `up` by its gate.

    Its linears are applied by the ports `in_proj` and `out_proj`, which are replaced from outside (ports.py).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_, bias = config.width, config.hidden, config.has_bias
        self.gate = nn.Linear(C, F_, bias=bias("gate")) if config.architecture.gated_mlp else None
        self.up = nn.Linear(C, F_, bias=bias("up"))
        self.down = nn.Linear(F_, C, bias=bias("down"))
        self.act = _ACTIVATION_FUNCTIONS[config.mlp_activation]
        self.in_proj = PlainInPort()
        self.out_proj = PlainOutPort()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            up, = self.in_proj(x, self.up)                                   # (B, T, F)
            return self.out_proj(self.act(up), self.down)                    # (B, T, C)
        gate, up = self.in_proj(x, self.gate, self.up)                       # (B, T, F) each
        return self.out_proj(self.act(gate) * up, self.down)                 # (B, T, C)

    def linears_by_port(self) -> dict[str, tuple[nn.Module, ...]]:
        """The linears that each port applies."""
        inputs = (self.up,) if self.gate is None else (self.gate, self.up)
        return {"in_proj": inputs, "out_proj": (self.down,)}
