"""What Hugging Face calls our tensors and our configuration, one table a family; it stays here.

GPT-2 stores its matrices (in, out) (Conv1D) with q, k and v side by side in `c_attn`; BLOOM stores q, k and
v by turns, a head of each; OPT's positions begin with two rows that no token reads; LLaMA and Qwen3 store
all as torch does. Options that change the mathematics and that the decoder does not have are refused by
name (hf_config.py). Used by hf.py, in both directions.
"""
from dataclasses import dataclass, field

from nanoinfra.model.source import Source

HEAD = "lm_head.weight"                      # carries no prefix, in any family


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
    defaults: dict = field(default_factory=dict)          # of ModelConfig's fields, where theirs is silent
    aliases: dict[str, str] = field(default_factory=dict)  # other names that older files have for keys
    widths: dict[str, int] = field(default_factory=dict)  # key -> how many times C it must be, or absent


def _both(ours, theirs, **how):
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}", **(how if kind == "weight" else {})) for kind in
            ("weight", "bias")}


def _gpt2():
    tensors = {"embed.weight": Source("wte.weight"), "positions.weight": Source("wpe.weight"),
               "head.weight": Source(HEAD), **_both("norm", "ln_f")}
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
                      "head.weight": Source(HEAD)}


def _opt():
    tensors = {"embed.weight": Source("decoder.embed_tokens.weight"), "head.weight": Source(HEAD),
               "positions.weight": Source("decoder.embed_positions.weight", skip=2),
               **_both("norm", "decoder.final_layer_norm")}
    block = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2",
             "attn.o": "self_attn.out_proj", **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"}}
    for ours, theirs in block.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"decoder.layers.{{i}}.{theirs}")
    return tensors


def _bloom():
    tensors = {"embed.weight": Source("word_embeddings.weight"), "head.weight": Source(HEAD),
               **_both("embed_norm", "word_embeddings_layernorm"), **_both("norm", "ln_f")}
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
             "attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    for ours, theirs in block.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"h.{{i}}.{theirs}")
    for third, ours in enumerate("qkv"):
        for kind in ("weight", "bias"):
            fused = Source(f"h.{{i}}.self_attention.query_key_value.{kind}", third=third, by_head=True)
            tensors[f"blocks.{{i}}.attn.{ours}.{kind}"] = fused
    return tensors


_LLAMA_KEYS = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
               "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
               "hidden": "intermediate_size", "context": "max_position_embeddings", "eps": "rms_norm_eps",
               "theta": "rope_theta", "tied": "tie_word_embeddings"}
_GPT2_KEYS = {"vocab": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
              "hidden": "n_inner", "context": "n_positions", "eps": "layer_norm_epsilon",
              "tied": "tie_word_embeddings"}
_OPT_KEYS = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
             "heads": "num_attention_heads", "hidden": "ffn_dim", "context": "max_position_embeddings",
             "tied": "tie_word_embeddings"}
_BLOOM_KEYS = {"vocab": "vocab_size", "width": "hidden_size", "layers": "n_layer", "heads": "n_head",
               "context": "seq_length", "eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"}
_PLAIN = {"quantization_config": (None,)}
_LLAMA_FIXED = _PLAIN | {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
                         "partial_rotary_factor": (1.0,), "use_sliding_window": (False,)}
_GPT2_FIXED = _PLAIN | {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)}
_OPT_FIXED = _PLAIN | {
    "activation_function": ("relu",), "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
    "enable_bias": (True,), "layer_norm_elementwise_affine": (True,)}
_BLOOM_FIXED = _PLAIN | {"apply_residual_connection_post_layernorm": (False,)}

DIALECTS = {
    "gpt2": Dialect("GPT2LMHeadModel", "transformer.", _gpt2(), _GPT2_KEYS, _GPT2_FIXED,
                    r"h\.\d+\.attn\.(bias|masked_bias)", True, defaults={"eps": 1e-5}),
    "llama": Dialect("LlamaForCausalLM", "model.", _llama(), _LLAMA_KEYS, _LLAMA_FIXED,
                     r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", False),
    "qwen3": Dialect("Qwen3ForCausalLM", "model.", _llama(), _LLAMA_KEYS, _LLAMA_FIXED,
                     r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", False),
    "opt": Dialect("OPTForCausalLM", "model.", _opt(), _OPT_KEYS, _OPT_FIXED, r"decoder\.version", True,
                   defaults={"eps": 1e-5}, widths={"word_embed_proj_dim": 1}),
    "bloom": Dialect("BloomForCausalLM", "transformer.", _bloom(), _BLOOM_KEYS, _BLOOM_FIXED, "", True,
                     # it has no longest sequence: 2048 is what BLOOM was trained with
                     defaults={"eps": 1e-5, "context": 2048}, widths={"n_inner": 4},
                     aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer",
                              "num_attention_heads": "n_head"}),
}
