"""What a GGUF file's keys say of the decoder: its ModelConfig, as llama.cpp computes it.

Each architecture's keys are read, known to change nothing, or refused by name. RoPE is scaled as in llama.cpp
(src/llama-context.cpp, ggml/src/ggml-cpu/ops.cpp): linear by 1 / factor; yarn with cos and sin times
(1 + 0.1 ln factor) * attn_factor; Llama 3.1's per-pair factors lie in the tensor rope_freqs.weight.
"""
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nanoinfra.config import ModelConfig, RopeScaling

SIZES = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
         "hidden": "feed_forward_length", "context": "context_length"}
EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
ARCHITECTURES = ("gpt2", "llama", "phi3", "qwen2", "qwen3")     # Mistral's files say llama
WINDOW = ("phi3",)                           # in whose files a sliding window stands
HARMLESS = {*SIZES.values(), *EPS.values(), "attention.head_count_kv", "vocab_size", "rope.freq_base",
            "rope.scaling.finetuned", "tensor_data_layout"}
ROPE = {"rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor",
        "rope.scaling.original_context_length"}
NEUTRAL = {                                  # key -> the values with which it changes nothing
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,), "attention.scale": (0,), "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,), "logit_scale": (0, 1), "residual_scale": (0, 1),
    "embedding_scale": (0, 1), "expert_count": (0,), "expert_used_count": (0,), "nextn_predict_layers": (0,),
    "pooling_type": (0,), "use_parallel_residual": (False,), "leading_dense_block_count": (0,),
    # llama.cpp reads what follows for other architectures only
    "rope.scaling.yarn_ext_factor": (1,), "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,), "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.alpha": (0,)}


LINEAR = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
          "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}          # linear layers, ours -> theirs
WORDS = {int: "whole number", float: "number", str: "string", bool: "truth value", list: "list of strings",
         np.ndarray: "list of numbers"}


class Keys:
    """A file's fields by their types. ValueError, with the key's name, for one missing or of another type."""

    def __init__(self, fields: Mapping[str, object], prefix: str = ""):
        self.fields, self.prefix = fields, prefix

    def get(self, key: str, kind: type, *default):
        """The value of `key`, a `kind`, or the default where there is no such key."""
        name = self.prefix + key
        if name not in self.fields:
            if default:
                return default[0]
            raise ValueError(f"the key {name} is missing")
        got = self.fields[name]
        if type(got) is int and kind is float:
            return float(got)
        if type(got) is not kind:
            raise ValueError(f"the key {name} is {str(got)[:40]!r}, not a {WORDS[kind]}")
        return got

    def size(self, key: str, *default: int) -> int:
        """A number of at least 1, the same for every layer where the file has one for each."""
        name = self.prefix + key
        got = self.fields.get(name)
        if isinstance(got, np.ndarray) and len(got) and (got == got[0]).all():
            got = got[0].item()
        elif isinstance(got, np.ndarray):
            raise ValueError(f"by {name} layers differ; this decoder has only layers of one shape")
        got = Keys({name: got} if got is not None else {}, self.prefix).get(key, int, *default)
        if got < 1:
            raise ValueError(f"the key {name} is {got}; try 1 or more")
        return got

    def positive(self, key: str, *default: float) -> float:
        """A finite number above 0, the shortest decimal of its float32: 1e-05 for 9.999999747378752e-06."""
        got = self.get(key, float, *default)
        if not (math.isfinite(got) and got > 0):
            raise ValueError(f"the key {self.prefix + key} is {got}, not a finite number above 0")
        return float(str(np.float32(got)))


def read_config(fields: Mapping[str, object], tensors: Mapping[str, object], rope_factors=()) -> ModelConfig:
    """The ModelConfig of an open GGUF file's `fields`, with biases and head as its `tensors` tell.

    `rope_factors` are the numbers of its rope_freqs.weight, where it has one.
    """
    architecture = architecture_of(fields)
    keys = Keys(fields, f"{architecture}.")
    given = {ours: keys.size(theirs) for ours, theirs in SIZES.items()}
    given |= _heads(keys, given["heads"], given["width"])
    config = ModelConfig(
        vocab=len(Keys(fields).get("tokenizer.ggml.tokens", list)), family=architecture,
        tied="output.weight" not in tensors, theta=keys.positive("rope.freq_base", 10000.0), **given)
    _check_keys(keys, config)
    config = replace(config, eps=keys.positive(EPS[config.parts.norm]), window=_window(keys, architecture))
    if config.parts.position == "rope":
        config = replace(config, rope_scaling=_rope_scaling(keys, config, rope_factors))
    return _biased(config, set(tensors))


def architecture_of(fields: Mapping[str, object]) -> str:
    """One of `ARCHITECTURES`. ValueError for what is another, or no model, or a piece of one."""
    keys = Keys(fields)
    if (pieces := keys.get("split.count", int, 1)) > 1:
        raise ValueError(f"it is one of {pieces} pieces of a model; put them together with llama.cpp's "
                         "`llama-gguf-split --merge FIRST-PIECE.gguf WHOLE.gguf`")
    if (what := keys.get("general.type", str, "model")) != "model":
        raise ValueError(f"it holds a {what!r}, not a model")
    name = keys.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is unknown; known are {', '.join(ARCHITECTURES)}")
    return name


def _heads(keys, heads, width):
    head_dim = keys.size("attention.key_length", max(1, width // heads))
    kv_heads = keys.size("attention.head_count_kv", heads)
    if heads % kv_heads:                     # before ModelConfig seeks what would fit
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    for key in ("attention.value_length", "rope.dimension_count"):
        if (got := keys.size(key, head_dim)) != head_dim:
            what = "RoPE turns" if key.startswith("rope") else "values have"
            raise ValueError(f"by {keys.prefix}{key} {what} {got} of a head's {head_dim} numbers; in this "
                             "decoder it is all of them")
    return {"head_dim": head_dim, "kv_heads": kv_heads}


def _check_keys(keys, config):
    """Refuse by name a key of the architecture that is not read here, unless it changes nothing."""
    known = HARMLESS | {"attention.key_length", "attention.value_length", "rope.dimension_count"}
    known |= ROPE if config.parts.position == "rope" else set()
    known |= {"attention.sliding_window"} if config.family in WINDOW else set()
    for name, value in keys.fields.items():
        key = name.removeprefix(keys.prefix)
        if key == name or key in known:
            continue
        if isinstance(value, (np.ndarray, list, str)) or value not in NEUTRAL.get(key, ()):
            raise ValueError(f"this decoder does not have what {name} = {str(value)[:40]} asks for")


def _window(keys, architecture):
    """The sliding window, the query included, that a file of Phi-3's says; 0 is none.

    transformers has it so; llama.cpp gives every query all keys, and warns that this may be worse.
    """
    if architecture not in WINDOW:
        return None
    return keys.get("attention.sliding_window", int, 0) or None


def _biased(config, names):
    """`config` with the biases that its file's linear layers have, as the first layer's `names` say.

    llama.cpp takes a bias where there is one. LLaMA with biases of q, k and v alone is Qwen2.
    """
    layers = [x for x in LINEAR if x != "gate" or config.parts.gated]
    there = {x for x in layers if f"blk.0.{LINEAR[x]}.bias" in names}
    there |= set("qkv") if "blk.0.attn_qkv.bias" in names else set()
    families = (config.family, "qwen2") if config.family == "llama" else (config.family,)
    for family in families:
        for attention in (None, True, False):
            for mlp in (None, True, False):
                found = replace(config, family=family, attention_bias=attention, mlp_bias=mlp)
                if {x for x in layers if found.has_bias(x)} == there:
                    return found
    return config                            # whoever checks the names says which are too many


def _rope_scaling(keys, config, rope_factors):
    kind = keys.get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"this decoder does not have what {keys.prefix}rope.scaling.type = {kind} asks for")
    factor = keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float, 0.0))
    factor = 1.0 if factor == 0.0 or kind == "none" else keys.positive("rope.scaling.factor", factor)
    length = keys.positive("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        if len(rope_factors) or config.theta <= 1:
            raise ValueError("this decoder has no yarn with rope_freqs.weight, or with a RoPE base of 1")
        return RopeScaling("yarn", factor, keys.size("rope.scaling.original_context_length", config.context),
                           attention_factor=length * (1 + 0.1 * math.log(max(1.0, factor))))
    if len(rope_factors):
        if len(rope_factors) != config.head_dim // 2 or not all(0 < x < math.inf for x in rope_factors):
            raise ValueError("rope_freqs.weight is not a number above 0 for each of "
                             f"{config.head_dim // 2} pairs")
        factors = tuple(x * factor for x in rope_factors)
        return RopeScaling("factors", attention_factor=length, factors=factors)
    return None if factor == length == 1.0 else RopeScaling("linear", factor, attention_factor=length)
