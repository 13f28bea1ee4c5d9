"""What transformers' configurations mean for a decoder: one table a family, and what none may say.

A table names the attributes that become fields of ModelConfig, those that the decoder has in one way only,
and those that change nothing it computes; an attribute in none of them must be at transformers' default.
Keys that a configuration class does not declare are ignored, as transformers ignores them, but for those
that its code looks for all the same (`UNDECLARED`). Read and written by hf_config.py.
"""
from dataclasses import dataclass, field

ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
               **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast",
                                "gelu_accurate"), "gelu_tanh")}           # theirs -> ours
WRITTEN = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}   # and back

# Attributes of every configuration that no decoder's logits depend on: training, outputs, token ids, history.
HARMLESS = frozenset((
    "transformers_version", "architectures", "output_hidden_states", "dtype", "id2label",
    "label2id", "problem_type", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "chunk_size_feed_forward", "pretraining_tp"))
# Rates of dropout, and deviations of first weights: for training alone.
RANDOM = frozenset(("dropout", "layerdrop", "attention_dropout", "hidden_dropout", "resid_pdrop",
                    "embd_pdrop", "attn_pdrop", "initializer_range", "init_std"))
# Keys that transformers' code reads whether or not a configuration declares them, and the values that mean
# what we compute; with none, the key must be absent.
UNDECLARED = {
    "is_causal": (True,), "sliding_window": (None,), "attention_chunk_size": (None,), "layer_types": (),
    "per_layer_config": (None, {}), "kv_sharing_modes": (None,), "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,), "compression_config": (None,), "fusion_config": (None,),
    "transformers_weights": (None,), "configuration_files": (), "output_hidden_states": (None, True, False),
    **dict.fromkeys(("text_config", "text_encoder", "decoder", "generator"), (None,)),
    **dict.fromkeys(("dtype", "torch_dtype"), (None, "float64", "float32", "float16", "bfloat16"))}
# Names of transformers' class, beside its fields, that a configuration may have a value for.
SETTABLE = ("rope_scaling", "num_labels", "torch_dtype", "output_attentions", "attn_implementation",
            "_attn_implementation", "name_or_path", "_name_or_path", "per_layer_config")
# How a family has sliding windows: in all layers, or by layers; the attributes that say so.
WINDOWS = {None: (), "all": ("sliding_window",),
           "layered": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")}


@dataclass(frozen=True)
class Table:
    """What the configuration of one family says, by the names of transformers' attributes."""
    architecture: str                        # transformers' class
    fields: dict[str, str]                   # ModelConfig's fields -> theirs, of one meaning
    activation: str | None = None            # ACTIVATIONS has its values
    biases: dict[str, str] = field(default_factory=dict)  # attention_bias and mlp_bias -> theirs
    windows: str | None = None               # a key of WINDOWS
    fixed: dict[str, tuple] = field(default_factory=dict)  # attribute -> the values the decoder has
    harmless: frozenset[str] = frozenset()   # what else changes no logits
    same: dict[str, str] = field(default_factory=dict)    # attribute -> the one that it must be equal to
    whole_heads: bool = False                # must the heads divide the width? transformers refuses others
    cores: tuple = ("eager", "sdpa")         # what attn_implementation may be: transformers has them
    pads: bool = True                        # must the pad token be one of the vocabulary? as above
    scaled: bool = True                      # can RoPE be stretched? (Phi-3's by longrope alone)


_SIZES = {"vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
          "heads": "num_attention_heads", "context": "max_position_embeddings", "tied": "tie_word_embeddings"}
_LLAMA = _SIZES | {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden": "intermediate_size",
                   "eps": "rms_norm_eps"}
_GPT2 = {"vocab": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head",
         "hidden": "n_inner", "context": "n_positions", "eps": "layer_norm_epsilon",
         "tied": "tie_word_embeddings"}
_BLOOM = {"vocab": "vocab_size", "width": "hidden_size", "layers": "n_layer", "heads": "n_head",
          "context": "seq_length", "eps": "layer_norm_epsilon", "tied": "tie_word_embeddings"}

TABLES = {
    "gpt2": Table(
        "GPT2LMHeadModel", _GPT2, "activation_function", whole_heads=True, pads=False,
        fixed={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
               "add_cross_attention": (False,)},
        harmless=frozenset(("summary_type", "summary_use_proj", "summary_activation",
                            "summary_proj_to_labels", "summary_first_dropout", "reorder_and_upcast_attn"))),
    "llama": Table(
        "LlamaForCausalLM", _LLAMA, "hidden_act", whole_heads=True,
        biases={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}),
    "mistral": Table("MistralForCausalLM", _LLAMA, "hidden_act", windows="all"),
    "phi3": Table(
        "Phi3ForCausalLM", _LLAMA, "hidden_act", windows="all", scaled=False,
        harmless=frozenset(("original_max_position_embeddings",))),       # for longrope alone
    "qwen2": Table("Qwen2ForCausalLM", _LLAMA, "hidden_act", windows="layered"),
    "qwen3": Table(
        "Qwen3ForCausalLM", _LLAMA, "hidden_act", biases={"attention_bias": "attention_bias"},
        windows="layered"),
    "opt": Table(
        "OPTForCausalLM", _SIZES | {"hidden": "ffn_dim"}, "activation_function",
        biases={"attention_bias": "enable_bias", "mlp_bias": "enable_bias"}, whole_heads=True,
        same={"word_embed_proj_dim": "hidden_size"},
        fixed={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
               "layer_norm_elementwise_affine": (True,)}),          # and eps is torch's 1e-5
    "bloom": Table(
        "BloomForCausalLM", _BLOOM, whole_heads=True, pads=False, cores=("eager",),
        fixed={"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)}),
}
