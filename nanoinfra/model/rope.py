"""RoPE: pair j of a head turns by position * f_j, so that q.k sees distances alone; and its longer contexts.

Su et al. 2021: f_j = theta^(-2j/K). A model that is to read more tokens than it was trained with has its
frequencies stretched:
linear (Chen et al. 2023): f_j / factor, as if all positions lay closer.
dynamic (bloc97, emozilla 2023): theta grows with the sequence once it is longer than the original context T0,
    theta (factor T / T0 - factor + 1)^(K / (K - 2)), so that the slowest pair spans T and the fastest stays.
yarn (Peng et al. 2023): pairs that turn more than beta_fast times in T0 tokens stay, those that turn less
    than beta_slow times are divided by factor, and between the two a ramp along the pairs; cos and sin are
    multiplied by an attention factor.
llama3 (Llama team 2024): the same, with high_freq_factor and low_freq_factor turns; the ramp is along the
    number of turns.
factors: each pair divided by a number of its own, as GGUF files store it.
T tokens, B sequences, H heads, K head_dim.
"""
import math

import torch

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.model.layers import wide


def rope_angles(positions: torch.Tensor, config: ModelConfig,
                dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * f_j for `positions` (T,) or (B, T).

    They come as (1, T, K/2) or (B, 1, T, K/2), ready to meet (B, H, T, K), in at least float32. So few
    numbers are taken anew at every call of the decoder; nothing is stored.
    """
    scaling, theta = config.rope_scaling, config.theta
    if scaling and scaling.kind == "dynamic":
        theta = dynamic_theta(scaling, theta, config.head_dim, 1 + int(positions.max()))
    j = torch.arange(0, config.head_dim, 2, device=positions.device).to(wide(dtype))
    frequency = 1.0 / theta ** (j / config.head_dim)                      # (K/2,)
    if scaling and scaling.kind in STRETCHED:
        frequency = STRETCHED[scaling.kind](frequency, scaling, theta)
    angle = positions.unsqueeze(-2).unsqueeze(-1) * frequency             # (1, T, K/2) or (B, 1, T, K/2)
    longer = scaling.attention_factor if scaling else 1.0
    return (angle.cos(), angle.sin()) if longer == 1.0 else (angle.cos() * longer, angle.sin() * longer)


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (x[j], x[j + K/2]) of `x` (B, H, T, K) by their angles.

    The paper pairs neighbours, Hugging Face the two halves: the same but for the order of q's and k's rows.
    """
    cos, sin = rope
    a, b = x.to(cos.dtype).chunk(2, dim=-1)                               # (B, H, T, K/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def dynamic_theta(scaling: RopeScaling, theta: float, head_dim: int, length: int) -> float:
    """RoPE's base for a sequence of `length` tokens: `theta` up to the original context."""
    longer = max(1.0, length / scaling.original_context)
    return theta * (scaling.factor * longer - scaling.factor + 1) ** (head_dim / (head_dim - 2))


def _linear(frequency, scaling, theta):
    return frequency / scaling.factor


def _yarn(frequency, scaling, theta):
    pairs = len(frequency)

    def pair_of(turns):
        """The pair, not whole, that turns so many times in the original context."""
        return pairs * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = torch.arange(pairs, device=frequency.device).to(frequency.dtype) - first
    divided = (ramp / (last - first or 0.001)).clamp(0, 1)                # (K/2,), how far
    return frequency / scaling.factor * divided + frequency * (1 - divided)


def _llama3(frequency, scaling, theta):
    turns = scaling.original_context * frequency / (2 * math.pi)          # (K/2,), in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def _factors(frequency, scaling, theta):
    return frequency / torch.tensor(scaling.factors, dtype=frequency.dtype, device=frequency.device)


STRETCHED = {"linear": _linear, "yarn": _yarn, "llama3": _llama3, "factors": _factors}
