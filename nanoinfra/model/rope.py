"""RoPE, rotary position embedding: pair j of a head rotates by position * f_j, so q.k depends on distance.

Su et al. 2021: f_j = theta^(-2j/K). RoPE scaling changes the frequencies for a context longer than the
original context T0: linear (Chen et al. 2023), dynamic (dynamic NTK, bloc97 and emozilla 2023), yarn (Peng et
al. 2023), llama3 (Llama team 2024) and factors (one number a pair, as in GGUF files); see each function.
T tokens, B sequences, H heads, K head_dim.
"""
import math

import torch

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.model.layers import at_least_float32


def rope_cos_sin(positions: torch.Tensor, config: ModelConfig,
                 dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of position * f_j for `positions` (T,) or (B, T), in at least float32.

    Their shape is (1, T, K/2) or (B, 1, T, K/2), which broadcasts against (B, H, T, K/2). They are computed
    again in every call of the decoder and not stored.
    """
    scaling, theta = config.rope_scaling, config.theta
    if scaling and scaling.kind == "dynamic":
        theta = dynamic_ntk_theta(scaling, theta, config.head_dim, 1 + int(positions.max()))
    j = torch.arange(0, config.head_dim, 2, device=positions.device).to(at_least_float32(dtype))
    frequency = 1.0 / theta ** (j / config.head_dim)                      # (K/2,)
    if scaling and scaling.kind in ROPE_FREQUENCY_SCALING:
        frequency = ROPE_FREQUENCY_SCALING[scaling.kind](frequency, scaling, theta)
    angle = positions.unsqueeze(-2).unsqueeze(-1) * frequency             # (1, T, K/2) or (B, 1, T, K/2)
    longer = scaling.attention_factor if scaling else 1.0
    return (angle.cos(), angle.sin()) if longer == 1.0 else (angle.cos() * longer, angle.sin() * longer)


def apply_rotary_emb(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the pairs (x[j], x[j + K/2]) of `x` (B, H, T, K) by the angles of `rope`, (cos, sin).

    The paper pairs neighbours, Hugging Face the two halves of a head; only the order of q's and k's rows
    differs.
    """
    cos, sin = rope
    a, b = x.to(cos.dtype).chunk(2, dim=-1)                               # (B, H, T, K/2) each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def dynamic_ntk_theta(scaling: RopeScaling, theta: float, head_dim: int, length: int) -> float:
    """RoPE's base for a sequence of `length` tokens under dynamic NTK scaling.

    It is `theta` up to the original context T0, then theta (factor T / T0 - factor + 1)^(K / (K - 2)), so
    that the slowest pair spans T and the fastest is unchanged.
    """
    longer = max(1.0, length / scaling.original_context)
    return theta * (scaling.factor * longer - scaling.factor + 1) ** (head_dim / (head_dim - 2))


def _linear(frequency, scaling, theta):
    """Position interpolation: every frequency is divided by the factor."""
    return frequency / scaling.factor


def _yarn(frequency, scaling, theta):
    """YaRN: a ramp along the pairs from unchanged frequencies to divided ones.

    Pairs that rotate more than beta_fast times in T0 tokens are unchanged, those that rotate fewer than
    beta_slow times are divided by the factor. cos and sin are multiplied by attention_factor.
    """
    pairs = len(frequency)

    def pair_of(turns):
        """The pair (a fraction) that rotates `turns` times in the original context."""
        return pairs * math.log(scaling.original_context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = torch.arange(pairs, device=frequency.device).to(frequency.dtype) - first
    divided = (ramp / (last - first or 0.001)).clamp(0, 1)                # (K/2,), 1: divided by the factor
    return frequency / scaling.factor * divided + frequency * (1 - divided)


def _llama3(frequency, scaling, theta):
    """Llama 3: as YaRN, with high_freq_factor and low_freq_factor; the ramp is along the rotations."""
    turns = scaling.original_context * frequency / (2 * math.pi)          # (K/2,), in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * kept + frequency / scaling.factor * (1 - kept)


def _factors(frequency, scaling, theta):
    """Each pair's frequency is divided by its own factor."""
    return frequency / torch.tensor(scaling.factors, dtype=frequency.dtype, device=frequency.device)


ROPE_FREQUENCY_SCALING = {"linear": _linear, "yarn": _yarn, "llama3": _llama3, "factors": _factors}
