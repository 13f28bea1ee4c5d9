"""The attributes of transformers' configurations and their meaning for a decoder: one table for each family.

A table names the attributes that become fields of ModelConfig, those of which the decoder supports only some
values, and those that change nothing in the logits; any other attribute must have transformers' default.
Keys that a configuration class does not declare are ignored, as transformers ignores them, except the
`UNDECLARED_HF_KEYS`, which its code reads nevertheless.
"""
from dataclasses import dataclass, field

ACTIVATION_FROM_HF = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
                      **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast",
                                       "gelu_accurate"), "gelu_tanh")}
ACTIVATION_TO_HF = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Attributes of every configuration that do not change the logits: training, outputs, token ids, history.
IGNORED_HF_KEYS = frozenset((
    "transformers_version", "architectures", "output_hidden_states", "dtype", "id2label",
    "label2id", "problem_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "chunk_size_feed_forward", "pretraining_tp"))
# Dropout rates, and standard deviations of initial weights: they matter for training alone.
TRAINING_ONLY_HF_KEYS = frozenset((
    "dropout", "layerdrop", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "initializer_range", "init_std"))
# Keys that transformers' code reads even if a configuration does not declare them, and the supported values;
# where there is none, the key must be absent.
UNDECLARED_HF_KEYS = {
    "is_causal": (True,), "sliding_window": (None,), "attention_chunk_size": (None,), "layer_types": (),
    "per_layer_config": (None, {}), "kv_sharing_modes": (None,), "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,), "compression_config": (None,), "fusion_config": (None,),
    "transformers_weights": (None,), "configuration_files": (), "output_hidden_states": (None, True, False),
    **dict.fromkeys(("text_config", "text_encoder", "decoder", "generator"), (None,)),
    **dict.fromkeys(("dtype", "torch_dtype"), (None, "float64", "float32", "float16", "bfloat16"))}
# Attributes of transformers' class, besides its fields, that a configuration can set.
SETTABLE_HF_KEYS = ("rope_scaling", "num_labels", "torch_dtype", "output_attentions", "attn_implementation",
                    "_attn_implementation", "name_or_path", "_name_or_path", "per_layer_config")
# How a family has sliding windows (none, in all layers, by layer), and the attributes for it.
SLIDING_WINDOW_HF_KEYS = {
    None: (), "all": ("sliding_window",),
    "layered": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")}


@dataclass(frozen=True)
class HFConfigTable:
    """How transformers' configuration of one family maps to a ModelConfig."""
    model_class: str                         # transformers' class
    config_keys: dict[str, str]              # field of ModelConfig -> attribute with the same meaning
    activation_key: str | None = None        # its values are in ACTIVATION_FROM_HF
    bias_keys: dict[str, str] = field(default_factory=dict)            # attention_bias, mlp_bias -> attribute
    window_style: str | None = None          # a key of SLIDING_WINDOW_HF_KEYS
    supported_values: dict[str, tuple] = field(default_factory=dict)   # attribute -> values
    ignored_keys: frozenset[str] = frozenset()   # further attributes that do not change the logits
    equal_keys: dict[str, str] = field(default_factory=dict)   # attribute -> another one that it must equal
    heads_divide_width: bool = False         # transformers requires it
    attn_implementations: tuple = ("eager", "sdpa")      # those that transformers has
    pad_token_in_vocab: bool = True          # transformers requires it
    has_rope_scaling: bool = True            # Phi-3 has longrope alone


_SIZES = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
          "heads": "num_attention_heads", "context": "max_position_embeddings", "tied": "tie_word_embeddings"}
_LLAMA = _SIZES | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden": "intermediate_size",
                   "eps": "rms_norm_eps"}
_GPT2 = {"vocab": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
         "hidden": "n_inner", "context": "n_positions", "eps": "layer_norm_epsilon",
         "tied": "tie_word_embeddings"}
_BLOOM = {"vocab": "vocab_size", "width": "hidden_size", "layers": "n_layer", "heads": "n_head",
          "context": "seq_length", "eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"}

HF_CONFIG_TABLES = {
    "gpt2": HFConfigTable(
        "GPT2LMHeadModel", _GPT2, "activation_function", heads_divide_width=True, pad_token_in_vocab=False,
        supported_values={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                          "add_cross_attention": (False,)},
        ignored_keys=frozenset(("summary_type", "summary_use_proj", "summary_activation",
                                "summary_proj_to_labels", "summary_first_dropout",
                                "reorder_and_upcast_attn"))),
    "llama": HFConfigTable(
        "LlamaForCausalLM", _LLAMA, "hidden_act", heads_divide_width=True,
        bias_keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}),
    "mistral": HFConfigTable("MistralForCausalLM", _LLAMA, "hidden_act", window_style="all"),
    "phi3": HFConfigTable(
        "Phi3ForCausalLM", _LLAMA, "hidden_act", window_style="all", has_rope_scaling=False,
        ignored_keys=frozenset(("original_max_position_embeddings",))),       # for longrope alone
    "qwen2": HFConfigTable("Qwen2ForCausalLM", _LLAMA, "hidden_act", window_style="layered"),
    "qwen3": HFConfigTable(
        "Qwen3ForCausalLM", _LLAMA, "hidden_act", bias_keys={"attention_bias": "attention_bias"},
        window_style="layered"),
    "opt": HFConfigTable(
        "OPTForCausalLM", _SIZES | {"hidden": "ffn_dim"}, "activation_function",
        bias_keys={"attention_bias": "enable_bias", "mlp_bias": "enable_bias"}, heads_divide_width=True,
        equal_keys={"word_embed_proj_dim": "hidden_size"},
        supported_values={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
                          "layer_norm_elementwise_affine": (True,)}),    # eps is torch's default, 1e-5
    "bloom": HFConfigTable(
        "BloomForCausalLM", _BLOOM, heads_divide_width=True, pad_token_in_vocab=False,
        attn_implementations=("eager",),
        supported_values={"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)}),
}
