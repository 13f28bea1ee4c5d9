"""The ModelConfig of a GGUF file, from its metadata, as llama.cpp computes it.

Each metadata key of an architecture is read, known to change nothing, or refused by name. RoPE is scaled as
in llama.cpp (src/llama-context.cpp, ggml/src/ggml-cpu/ops.cpp): linear by 1 / factor; yarn with cos and sin
times (1 + 0.1 ln factor) * attn_factor; Llama 3.1's per-pair factors are in the tensor rope_freqs.weight.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from nanoinfra.config import ModelConfig, RopeScaling

_SIZE_KEYS = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
              "hidden": "feed_forward_length", "context": "context_length"}
_EPS_KEYS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
_GGUF_ARCHITECTURES = ("gpt2", "llama", "phi3", "qwen2", "qwen3")     # Mistral's files say llama
_WINDOWED_ARCHITECTURES = ("phi3",)          # their files have a sliding window
_IGNORED_KEYS = {*_SIZE_KEYS.values(), *_EPS_KEYS.values(), "attention.head_count_kv", "vocab_size",
                 "rope.freq_base", "rope.scaling.finetuned", "tensor_data_layout"}
_ROPE_KEYS = {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
              "rope.scaling.original_context_length"}
_NEUTRAL_VALUES = {                                  # key -> the values with which it changes nothing
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,), "attention.scale": (0,), "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,), "logit_scale": (0, 1), "residual_scale": (0, 1),
    "embedding_scale": (0, 1), "expert_count": (0,), "expert_used_count": (0,), "nextn_predict_layers": (0,),
    "pooling_type": (0,), "use_parallel_residual": (False,), "leading_dense_block_count": (0,),
    # llama.cpp reads the following keys for other architectures only
    "rope.scaling.yarn_ext_factor": (1,), "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,), "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.alpha": (0,)}


GGUF_LINEAR_NAMES = {                        # ours -> GGUF's
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
_TYPE_WORDS = {int: "whole number", float: "number", str: "string", bool: "truth value",
               list: "list of strings", np.ndarray: "list of numbers"}


class GGUFMetadata:
    """Typed access to a GGUF file's metadata; `prefix` is put before every key.

    Raises ValueError, with the key's name, for a key that is missing or has a value of another type.
    """

    def __init__(self, metadata: Mapping[str, object], prefix: str = ""):
        self.metadata, self.prefix = metadata, prefix

    def get_typed(self, key: str, kind: type, *default):
        """The value of `key`, which must be a `kind`, or the default where there is no such key."""
        name = self.prefix + key
        if name not in self.metadata:
            if default:
                return default[0]
            raise ValueError(f"the key {name} is missing")
        got = self.metadata[name]
        if type(got) is int and kind is float:
            return float(got)
        if type(got) is not kind:
            raise ValueError(f"the key {name} is {str(got)[:40]!r}, not a {_TYPE_WORDS[kind]}")
        return got

    def positive_int(self, key: str, *default: int) -> int:
        """A whole number of at least 1; where the file has one for each layer, they must be the same."""
        name = self.prefix + key
        got = self.metadata.get(name)
        if isinstance(got, np.ndarray) and len(got) and (got == got[0]).all():
            got = got[0].item()
        elif isinstance(got, np.ndarray):
            raise ValueError(f"by {name} layers differ; this decoder has only layers of one shape")
        got = GGUFMetadata({name: got} if got is not None else {}, self.prefix).get_typed(key, int, *default)
        if got < 1:
            raise ValueError(f"the key {name} is {got}; try 1 or more")
        return got

    def positive_float(self, key: str, *default: float) -> float:
        """A finite number above 0, as its float32's shortest decimal: 1e-05 for 9.999999747378752e-06."""
        got = self.get_typed(key, float, *default)
        if not (math.isfinite(got) and got > 0):
            raise ValueError(f"the key {self.prefix + key} is {got}, not a finite number above 0")
        return float(str(np.float32(got)))


def model_config_from_gguf(metadata: Mapping[str, object], tensors: Mapping[str, object],
                           rope_factors: Sequence[float] = ()) -> ModelConfig:
    """The ModelConfig of an open GGUF file; the names of its `tensors` tell which biases and head it has.

    `rope_factors` are the numbers of its rope_freqs.weight, where it has one. Raises ValueError for what the
    decoder does not have.
    """
    architecture = gguf_architecture(metadata)
    keys = GGUFMetadata(metadata, f"{architecture}.")
    given = {ours: keys.positive_int(theirs) for ours, theirs in _SIZE_KEYS.items()}
    given |= _heads(keys, given["heads"], given["width"])
    config = ModelConfig(
        vocab=len(GGUFMetadata(metadata).get_typed("tokenizer.ggml.tokens", list)), family=architecture,
        tied="output.weight" not in tensors, theta=keys.positive_float("rope.freq_base", 10000.0), **given)
    _check_keys(keys, config)
    eps = keys.positive_float(_EPS_KEYS[config.architecture.norm_type])
    config = replace(config, eps=eps, window=_window(keys, architecture))
    if config.architecture.position_encoding == "rope":
        config = replace(config, rope_scaling=_rope_scaling(keys, config, rope_factors))
    return _biased(config, set(tensors))


def gguf_architecture(metadata: Mapping[str, object]) -> str:
    """The file's model architecture. Raises ValueError if it is unknown, no model, or a piece of a model."""
    keys = GGUFMetadata(metadata)
    if (pieces := keys.get_typed("split.count", int, 1)) > 1:
        raise ValueError(f"it is one of {pieces} pieces of a model; put them together with llama.cpp's "
                         "`llama-gguf-split --merge FIRST-PIECE.gguf WHOLE.gguf`")
    if (what := keys.get_typed("general.type", str, "model")) != "model":
        raise ValueError(f"it holds a {what!r}, not a model")
    name = keys.get_typed("general.architecture", str)
    if name not in _GGUF_ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is unknown; known are {', '.join(_GGUF_ARCHITECTURES)}")
    return name


def _heads(keys, heads, width):
    head_dim = keys.positive_int("attention.key_length", max(1, width // heads))
    kv_heads = keys.positive_int("attention.head_count_kv", heads)
    if heads % kv_heads:                     # before ModelConfig searches for a number that divides
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := keys.positive_int(key, head_dim)) != head_dim:
            what = "RoPE turns" if key.startswith("rope") else "values have"
            raise ValueError(f"by {keys.prefix}{key} {what} {got} of a head's {head_dim} numbers; in this "
                             "decoder it is all of them")
    return {"head_dim": head_dim, "kv_heads": kv_heads}


def _check_keys(keys, config):
    """Raise ValueError for a key of the architecture that is not read here, unless it changes nothing."""
    known = _IGNORED_KEYS | {"attention.key_length", "attention.value_length", "rope.dimension_count"}
    known |= _ROPE_KEYS if config.architecture.position_encoding == "rope" else set()
    known |= {"attention.sliding_window"} if config.family in _WINDOWED_ARCHITECTURES else set()
    for name, value in keys.metadata.items():
        key = name.removeprefix(keys.prefix)
        if key == name or key in known:
            continue
        if isinstance(value, (np.ndarray, list, str)) or value not in _NEUTRAL_VALUES.get(key, ()):
            raise ValueError(f"this decoder does not have what {name} = {str(value)[:40]} asks for")


def _window(keys, architecture):
    """The sliding window of a Phi-3 file, the query included; 0 is none.

    It is transformers' meaning; llama.cpp gives every query all keys, and warns that this can be worse.
    """
    if architecture not in _WINDOWED_ARCHITECTURES:
        return None
    return keys.get_typed("attention.sliding_window", int, 0) or None


def _biased(config, names):
    """`config` with the biases that the linears of the file's first layer have, by their tensor `names`.

    llama.cpp uses a bias where there is one. LLaMA with biases of q, k and v alone is Qwen2.
    """
    layers = [x for x in GGUF_LINEAR_NAMES if x != "gate" or config.architecture.gated_mlp]
    there = {x for x in layers if f"blk.0.{GGUF_LINEAR_NAMES[x]}.bias" in names}
    there |= set("qkv") if "blk.0.attn_qkv.bias" in names else set()
    families = (config.family, "qwen2") if config.family == "llama" else (config.family,)
    for family in families:
        for attention in (None, True, False):
            for mlp in (None, True, False):
                found = replace(config, family=family, attention_bias=attention, mlp_bias=mlp)
                if {x for x in layers if found.has_bias(x)} == there:
                    return found
    return config                            # check_tensor_names refuses the surplus biases by name


def _rope_scaling(keys, config, rope_factors):
    kind = keys.get_typed("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"this decoder does not have what {keys.prefix}rope.scaling.type = {kind} asks for")
    factor = keys.get_typed("rope.scaling.factor", float, keys.get_typed("rope.scale_linear", float, 0.0))
    factor = 1.0 if factor == 0.0 or kind == "none" else keys.positive_float("rope.scaling.factor", factor)
    length = keys.positive_float("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        if len(rope_factors) or config.theta <= 1:
            raise ValueError("this decoder has no yarn with rope_freqs.weight, or with a RoPE base of 1")
        original_context = keys.positive_int("rope.scaling.original_context_length", config.context)
        return RopeScaling("yarn", factor, original_context,
                           attention_factor=length * (1 + 0.1 * math.log(max(1.0, factor))))
    if len(rope_factors):
        if len(rope_factors) != config.head_dim // 2 or not all(0 < x < math.inf for x in rope_factors):
            raise ValueError("rope_freqs.weight is not a number above 0 for each of "
                             f"{config.head_dim // 2} pairs")
        factors = tuple(x * factor for x in rope_factors)
        return RopeScaling("factors", attention_factor=length, factors=factors)
    return None if factor == length == 1.0 else RopeScaling("linear", factor, attention_factor=length)
