"""RoPE in transformers' words and in ours: rope_parameters to theta, scaling and context, and back.

The numbers are taken as transformers' modeling_rope_utils.py takes them; the formulas are in model/rope.py.
The context is the longest sequence a stretched model is made for: factor times max_position_embeddings where
that is the original length (linear, dynamic), as vLLM has it, and yarn's original length times its factor.
"""
import math
from collections.abc import Mapping

from nanoinfra.config import ModelConfig, RopeScaling

LONGEST = 2**31
ORIGINAL = "original_max_position_embeddings"
KINDS = {                                    # RopeScaling's fields -> theirs
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context": ORIGINAL, "attention_factor": "attention_factor",
             "beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate"},
    "llama3": {"factor": "factor", "original_context": ORIGINAL, "low_freq_factor": "low_freq_factor",
               "high_freq_factor": "high_freq_factor"},
}
LLAMA3 = [RopeScaling("llama3", factor, 8192) for factor in (8.0, 32.0)]  # Llama 3.1's, and 3.2's


def rope_from(rope: Mapping, longest: int, head_dim: int) -> tuple[float, RopeScaling | None, int]:
    """Theta, scaling and context of their `rope` parameters and max_position_embeddings `longest`.

    Raises ValueError for what is not computed here, or cannot be computed at all.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs, and a head of {head_dim} has an odd number")
    kind, theta = rope.get("rope_type"), number(rope, "rope_theta")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, but RoPE turns all of "
                         "a head here")
    if kind == "default":
        return theta, None, longest
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type is {kind!r}, but RoPE is stretched here by {', '.join(KINDS)} only")
    if kind == "yarn":
        rope = _yarn(rope, longest, theta)
    given = {ours: number(rope, key) for ours, key in KINDS[kind].items() if ours != "truncate"}
    if kind == "yarn":
        given["truncate"] = rope["truncate"]
    if "original_context" in given and not isinstance(given["original_context"], int):
        raise ValueError(f"{ORIGINAL} is {given['original_context']!r}, no whole number")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise ValueError(f"high_freq_factor is {given['high_freq_factor']}, which must be more than "
                         f"low_freq_factor, {given['low_freq_factor']}")
    if kind == "dynamic":
        if head_dim == 2:
            raise ValueError("rope_type 'dynamic' divides by head_dim - 2, which is 0 here")
        given["original_context"] = longest
    context = _context(kind, given, longest)
    if context > LONGEST:
        raise ValueError(f"factor is {given['factor']}, which makes the context longer than {LONGEST}")
    return theta, RopeScaling(kind, **given), context


def rope_to(config: ModelConfig) -> dict:
    """Their `rope_parameters` and `max_position_embeddings` for a ModelConfig that has RoPE."""
    scaling, longest = config.rope_scaling, config.context
    if scaling is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": config.theta},
                "max_position_embeddings": longest}
    rope = {"rope_type": scaling.kind, "rope_theta": config.theta}
    rope |= {key: getattr(scaling, ours) for ours, key in KINDS[scaling.kind].items()}
    if scaling.kind == "dynamic":
        longest = scaling.original_context
    elif scaling.kind == "linear":
        longest = _divided(longest, max(scaling.factor, 1.0))
    return {"rope_parameters": rope, "max_position_embeddings": longest}


def plain_scaling(config: ModelConfig) -> RopeScaling | None:
    """The scaling of `config` by a kind that they have, without numbers that it does not read.

    Raises ValueError for factors by pair that are not those of Llama 3.
    """
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "factors":
        return _named(config)
    kept = {ours: getattr(scaling, ours) for ours in KINDS[scaling.kind]}
    if scaling.kind == "dynamic":
        kept["original_context"] = scaling.original_context
    return RopeScaling(scaling.kind, **kept)


def number(theirs: Mapping, key: str) -> float | int:
    """The number under `key`, more than 0, and one that float32 holds. ValueError for anything else."""
    value = theirs.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-30 < value < 1e30:
        raise ValueError(f"{key} is {str(value)[:40]!r}, which must be a number more than 0")
    return value


def _divided(context, factor):
    """The length that `factor` makes `context` of, where one is."""
    near = int(context / factor)
    return next((n for n in range(near, near + 3) if int(n * factor) == context), near)


def _context(kind, given, longest):
    if kind in ("linear", "dynamic"):
        return int(longest * max(given["factor"], 1.0))
    return max(longest, int(given["original_context"] * given["factor"])) if kind == "yarn" else longest


def _yarn(rope, longest, theta):
    """`rope` with what is absent in it filled in as transformers does."""
    if theta <= 1:
        raise ValueError(f"rope_theta is {theta}, but rope_type 'yarn' divides by its logarithm; it must be "
                         "more than 1")
    rope = {**rope, "beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1,
            "truncate": rope.get("truncate", True)}
    if not isinstance(rope["truncate"], bool):
        raise ValueError(f"truncate is {rope['truncate']!r}, which must be true or false")
    if rope.get("factor") is None:
        rope["factor"] = longest / number(rope, ORIGINAL)
    if rope.get("attention_factor") is None:
        both = rope.get("mscale") and rope.get("mscale_all_dim")
        scales = [number(rope, key) for key in ("mscale", "mscale_all_dim")] if both else [1, 0]
        top, bottom = (_mscale(number(rope, "factor"), scale) for scale in scales)
        rope["attention_factor"] = top / bottom
    return rope


def _mscale(factor, scale):
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _named(config):
    """Llama 3's scaling that `factors` are the numbers of. ValueError where they are of none."""
    for scaling in LLAMA3:
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
