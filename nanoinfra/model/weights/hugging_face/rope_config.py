"""Convert transformers' rope_parameters to RoPE's theta, scaling and context length, and back.

Values are read as in transformers' modeling_rope_utils.py; the formulas are in model/rope.py. The context is
the longest sequence of a model with scaled RoPE: factor times max_position_embeddings where that is the
original length (linear, dynamic), as in vLLM; for yarn, factor times the original length.
"""
import math
from collections.abc import Mapping

from nanoinfra.config import ModelConfig, RopeScaling

_MAX_CONTEXT = 2**31
_ORIGINAL_CONTEXT_KEY = "original_max_position_embeddings"
_SCALING_KEYS = {                            # kind -> {field of RopeScaling: transformers' key}
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context": _ORIGINAL_CONTEXT_KEY,
             "attention_factor": "attention_factor", "beta_fast": "beta_fast",
             "beta_slow": "beta_slow", "truncate": "truncate"},
    "llama3": {"factor": "factor", "original_context": _ORIGINAL_CONTEXT_KEY,
               "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
}
LLAMA3_ROPE_SCALINGS = [RopeScaling("llama3", factor, 8192) for factor in (8.0, 32.0)]  # Llama 3.1 and 3.2


def rope_from_hf(rope_parameters: Mapping, max_position_embeddings: int,
                 head_dim: int) -> tuple[float, RopeScaling | None, int]:
    """(theta, scaling, context) of transformers' rope_parameters and max_position_embeddings.

    Raises ValueError for scaling that is not supported here, or that cannot be computed at all.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs, and a head of {head_dim} has an odd number")
    kind, theta = rope_parameters.get("rope_type"), read_positive_number(rope_parameters, "rope_theta")
    if rope_parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {rope_parameters['partial_rotary_factor']!r}, but RoPE "
                         "turns all of a head here")
    if kind == "default":
        return theta, None, max_position_embeddings
    if not isinstance(kind, str) or kind not in _SCALING_KEYS:
        raise ValueError(f"rope_type is {kind!r}, but RoPE is stretched here by {', '.join(_SCALING_KEYS)} "
                         "only")
    if kind == "yarn":
        rope_parameters = _yarn(rope_parameters, max_position_embeddings, theta)
    given = {ours: read_positive_number(rope_parameters, key) for ours, key in _SCALING_KEYS[kind].items()
             if ours != "truncate"}
    if kind == "yarn":
        given["truncate"] = rope_parameters["truncate"]
    if "original_context" in given and not isinstance(given["original_context"], int):
        raise ValueError(f"{_ORIGINAL_CONTEXT_KEY} is {given['original_context']!r}, no whole number")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise ValueError(f"high_freq_factor is {given['high_freq_factor']}, which must be more than "
                         f"low_freq_factor, {given['low_freq_factor']}")
    if kind == "dynamic":
        if head_dim == 2:
            raise ValueError("rope_type 'dynamic' divides by head_dim - 2, which is 0 here")
        given["original_context"] = max_position_embeddings
    context = _context(kind, given, max_position_embeddings)
    if context > _MAX_CONTEXT:
        raise ValueError(f"factor is {given['factor']}, which makes the context longer than {_MAX_CONTEXT}")
    return theta, RopeScaling(kind, **given), context


def rope_to_hf(config: ModelConfig) -> dict:
    """transformers' `rope_parameters` and `max_position_embeddings` for a ModelConfig with RoPE."""
    scaling, max_position_embeddings = config.rope_scaling, config.context
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
                "max_position_embeddings": max_position_embeddings}
    rope = {"rope_type": scaling.kind, "rope_theta": config.theta}
    rope |= {key: getattr(scaling, ours) for ours, key in _SCALING_KEYS[scaling.kind].items()}
    if scaling.kind == "dynamic":
        max_position_embeddings = scaling.original_context
    elif scaling.kind == "linear":
        max_position_embeddings = _divided(max_position_embeddings, max(scaling.factor, 1.0))
    return {"rope_parameters": rope, "max_position_embeddings": max_position_embeddings}


def canonical_rope_scaling(config: ModelConfig) -> RopeScaling | None:
    """The RoPE scaling of `config` as a kind that transformers has, with unused fields at their defaults.

    Raises ValueError for per-pair factors that are not those of Llama 3.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "factors":
        return _named(config)
    kept = {ours: getattr(scaling, ours) for ours in _SCALING_KEYS[scaling.kind]}
    if scaling.kind == "dynamic":
        kept["original_context"] = scaling.original_context
    return RopeScaling(scaling.kind, **kept)


def read_positive_number(values: Mapping, key: str) -> float | int:
    """The value of `key`, a number above 0 that float32 can hold. Raises ValueError for anything else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
        raise ValueError(f"{key} is {str(value)[:40]!r}, which must be a number more than 0")
    return value


def _divided(context, factor):
    """The original length that `factor` scales to `context`, if there is one."""
    near = int(context / factor)
    return next((n for n in range(near, near + 3) if int(n * factor) == context), near)


def _context(kind, given, max_position_embeddings):
    if kind in ("linear", "dynamic"):
        return int(max_position_embeddings * max(given["factor"], 1.0))
    if kind == "yarn":
        return max(max_position_embeddings, int(given["original_context"] * given["factor"]))
    return max_position_embeddings


def _yarn(rope, max_position_embeddings, theta):
    """`rope` with its missing values filled in as transformers does."""
    if theta <= 1:
        raise ValueError(f"rope_theta is {theta}, but rope_type 'yarn' divides by its logarithm; it must be "
                         "more than 1")
    rope = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1,
            "truncate": rope.get("truncate", True)}
    if not isinstance(rope["truncate"], bool):
        raise ValueError(f"truncate is {rope['truncate']!r}, which must be true or false")
    if rope.get("factor") is None:
        rope["factor"] = max_position_embeddings / read_positive_number(rope, _ORIGINAL_CONTEXT_KEY)
    if rope.get("attention_factor") is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scales = [read_positive_number(rope, key) for key in ("mscale", "mscale_all_dim")] if both else [1, 0]
        top, bottom = (_mscale(read_positive_number(rope, "factor"), scale) for scale in scales)
        rope["attention_factor"] = top / bottom
    return rope


def _mscale(factor, scale):
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _named(config):
    """The Llama 3 scaling that gives these per-pair factors. Raises ValueError where none does."""
    for scaling in LLAMA3_ROPE_SCALINGS:
        if all(math.isclose(got, want, rel_tol=1e-5) for got, want in
               zip(config.rope_scaling.factors, _llama3_factors(scaling, config), strict=True)):
            return scaling
    raise ValueError("Hugging Face's configurations have no key for RoPE's factors by pair, and these are "
                     "not Llama 3.1's or 3.2's")


def _llama3_factors(scaling, config):
    for pair in range(config.head_dim // 2):
        turns = scaling.original_context / (2 * math.pi * config.theta ** (2 * pair / config.head_dim))
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        yield 1 / (kept + (1 - kept) / scaling.factor)
