"""What Hugging Face calls our tensors and our configuration, one table a family; it stays here.

GPT-2 stores its matrices (in, out) (Conv1D) with q, k and v side by side in `c_attn`; LLaMA and Qwen3 store
them as torch does. Options that change the mathematics and that the decoder does not have are refused by
name. Used by hf.py, in both directions.
"""
from dataclasses import dataclass

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.fill import Source


@dataclass(frozen=True)
class Dialect:
    """How one family is written: tensors, configuration keys, and the values its fixed options must have."""
    architecture: str                        # transformers' class
    prefix: str                              # before every name but the head's
    tensors: dict[str, Source]               # ours -> theirs
    keys: dict[str, str]                     # ModelConfig's fields -> theirs
    fixed: dict[str, tuple]                  # key -> values that mean what we compute; absent is the first
    buffers: str                             # names that are no weights, as a regular expression
    tied: bool                               # is the head tied where the configuration does not say


def _both(ours, theirs, **how):
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}", **(how if kind == "weight" else {})) for kind in
            ("weight", "bias")}


def _gpt2():
    tensors = {"embed.weight": Source("wte.weight"), "positions.weight": Source("wpe.weight"),
               "head.weight": Source("lm_head.weight"), **_both("norm", "ln_f")}
    block = {"norm1": "ln_1", "norm2": "ln_2"}
    linear = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    for ours, theirs in block.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"h.{{i}}.{theirs}")
    for ours, theirs in linear.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"h.{{i}}.{theirs}", transposed=True)
    for third, ours in enumerate("qkv"):
        tensors[f"blocks.{{i}}.attn.{ours}.weight"] = Source("h.{i}.attn.c_attn.weight", True, third)
        tensors[f"blocks.{{i}}.attn.{ours}.bias"] = Source("h.{i}.attn.c_attn.bias", False, third)
    return tensors


def _llama():
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    block |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    block |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}      # Qwen3 alone has these
    block |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    tensors = {f"blocks.{{i}}.{ours}.weight": Source(f"layers.{{i}}.{theirs}.weight")
               for ours, theirs in block.items()}
    return tensors | {"embed.weight": Source("embed_tokens.weight"), "norm.weight": Source("norm.weight"),
                      "head.weight": Source("lm_head.weight")}


_LLAMA_KEYS = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
               "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
               "hidden": "intermediate_size", "context": "max_position_embeddings", "eps": "rms_norm_eps",
               "theta": "rope_theta", "tied": "tie_word_embeddings"}
_GPT2_KEYS = {"vocab": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
              "hidden": "n_inner", "context": "n_positions", "eps": "layer_norm_epsilon",
              "tied": "tie_word_embeddings"}
_PLAIN = {"quantization_config": (None,)}
_LLAMA_FIXED = _PLAIN | {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
                         "partial_rotary_factor": (1.0,), "use_sliding_window": (False,)}
_GPT2_FIXED = _PLAIN | {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}

DIALECTS = {
    "gpt2": Dialect("GPT2LMHeadModel", "transformer.", _gpt2(), _GPT2_KEYS, _GPT2_FIXED,
                    r"h\.\d+\.attn\.(bias|masked_bias)", True),
    "llama": Dialect("LlamaForCausalLM", "model.", _llama(), _LLAMA_KEYS, _LLAMA_FIXED,
                     r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", False),
    "qwen3": Dialect("Qwen3ForCausalLM", "model.", _llama(), _LLAMA_KEYS, _LLAMA_FIXED,
                     r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", False),
}


def config_from(theirs: dict, where: str) -> ModelConfig:
    """Their config.json as a ModelConfig. Raises ValueError, with `where`, for what we do not compute."""
    family = theirs.get("model_type")
    if family not in DIALECTS:
        raise ValueError(f"{where}: model_type {family!r} is unknown; known are {', '.join(DIALECTS)}")
    dialect = DIALECTS[family]
    for key, allowed in dialect.fixed.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {key} is {theirs[key]!r}, but this decoder has only {allowed[0]!r}")
    given = {ours: theirs[key] for ours, key in dialect.keys.items() if theirs.get(key) is not None}
    given = _rope(theirs, where) | given
    width, heads = given.get("width", 0), given.get("heads", 1)
    defaults = {"kv_heads": heads, "tied": dialect.tied}
    defaults |= {"head_dim": width // heads} if family != "qwen3" else {}
    defaults |= {"hidden": 4 * width, "eps": 1e-5} if family == "gpt2" else {}
    given = defaults | given
    if missing := set(dialect.keys) - {*given, "theta"}:
        raise ValueError(f"{where} does not say {', '.join(sorted(dialect.keys[key] for key in missing))}")
    return ModelConfig(family=family, **given)


def config_to(config: ModelConfig) -> dict:
    """A ModelConfig as their config.json; token ids and dtype are the writer's to add."""
    dialect = DIALECTS[config.family]
    if config.family == "gpt2" and not config.heads == config.kv_heads == config.width / config.head_dim:
        raise ValueError(f"Hugging Face's GPT-2 has one width: {config.heads} heads and {config.kv_heads} "
                         f"KV heads of {config.head_dim} do not each make {config.width}; "
                         f"try {config.heads} heads of each kind, {config.width // config.heads} wide")
    theirs = {key: getattr(config, ours) for ours, key in dialect.keys.items()}
    if config.parts.position == "rope":
        theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": config.theta}
    return {"model_type": config.family, "architectures": [dialect.architecture], **theirs}


def _rope(theirs, where):
    """RoPE's base; newer files keep it in rope_parameters, older ones keep stretched RoPE in rope_scaling."""
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{where}: RoPE is scaled ({kind!r}), but this decoder has the plain one only")
    return {"theta": given["rope_theta"]} if "rope_theta" in given else {}
