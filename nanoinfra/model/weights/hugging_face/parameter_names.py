"""Hugging Face's parameter names for ours, one table for each family, to read and to write.

GPT-2 stores its matrices (in, out) (Conv1D) with q, k and v side by side in `c_attn`; Phi-3 stores q, k and v
in one tensor, gate and up in another; BLOOM interleaves q, k and v head by head; OPT's position embeddings
begin with two rows that no token reads; the other families store all tensors as torch does.
"""
from dataclasses import dataclass

from nanoinfra.model.weights.map_parameters_to_stored_tensors import TensorSource

HF_HEAD_WEIGHT = "lm_head.weight"            # without prefix in every family
QKV_LINEARS = ("attn.q", "attn.k", "attn.v")
_GATE_UP = ("mlp.gate", "mlp.up")


@dataclass(frozen=True)
class HFParameterNames:
    """The stored names of one family's parameters."""
    name_prefix: str                         # before every name but the head's
    tensor_sources: dict[str, TensorSource]  # our name -> where it is stored; {i} is a layer
    buffer_pattern: str                      # a regular expression for stored names that are no parameters


def _both(ours, theirs, **how):
    return {f"{ours}.{kind}": TensorSource(f"{theirs}.{kind}", **(how if kind == "weight" else {}))
            for kind in ("weight", "bias")}


def _block(names, layer):
    found = {}
    for ours, theirs in names.items():
        found |= _both(f"blocks.{{i}}.{ours}", f"{layer}.{{i}}.{theirs}")
    return found


def _gpt2():
    tensors = {"embed.weight": TensorSource("wte.weight"), "positions.weight": TensorSource("wpe.weight"),
               "head.weight": TensorSource(HF_HEAD_WEIGHT), **_both("norm", "ln_f"),
               **_block({"norm1": "ln_1", "norm2": "ln_2"}, "h")}
    for ours, theirs in {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"h.{{i}}.{theirs}", transposed=True)
    for ours in QKV_LINEARS:
        tensors[f"blocks.{{i}}.{ours}.weight"] = TensorSource("h.{i}.attn.c_attn.weight", True, QKV_LINEARS)
        tensors[f"blocks.{{i}}.{ours}.bias"] = TensorSource("h.{i}.attn.c_attn.bias", False, QKV_LINEARS)
    return tensors


def _llama():
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    block |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    block |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}      # only Qwen3 has these
    block |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    return {"embed.weight": TensorSource("embed_tokens.weight"), "norm.weight": TensorSource("norm.weight"),
            "head.weight": TensorSource(HF_HEAD_WEIGHT), **_block(block, "layers")}


def _phi3():
    tensors = _llama()
    for parts, theirs in ((QKV_LINEARS, "self_attn.qkv_proj"), (_GATE_UP, "mlp.gate_up_proj")):
        for ours in parts:
            source = TensorSource(f"layers.{{i}}.{theirs}.weight", fused_linears=parts)
            tensors[f"blocks.{{i}}.{ours}.weight"] = source
    return tensors


def _opt():
    block = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2",
             "attn.o": "self_attn.out_proj", **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"}}
    return {"embed.weight": TensorSource("decoder.embed_tokens.weight"),
            "head.weight": TensorSource(HF_HEAD_WEIGHT),
            "positions.weight": TensorSource("decoder.embed_positions.weight", rows_before=2),
            **_both("norm", "decoder.final_layer_norm"), **_block(block, "decoder.layers")}


def _bloom():
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
             "attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    tensors = {"embed.weight": TensorSource("word_embeddings.weight"),
               "head.weight": TensorSource(HF_HEAD_WEIGHT),
               **_both("embed_norm", "word_embeddings_layernorm"), **_both("norm", "ln_f"),
               **_block(block, "h")}
    for turn, ours in enumerate(QKV_LINEARS):
        for kind in ("weight", "bias"):
            fused = TensorSource(f"h.{{i}}.self_attention.query_key_value.{kind}", interleave_index=turn)
            tensors[f"blocks.{{i}}.{ours}.{kind}"] = fused
    return tensors


_LLAMA = HFParameterNames("model.", _llama(), r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
HF_PARAMETER_NAMES = {
    "gpt2": HFParameterNames("transformer.", _gpt2(), r"h\.\d+\.attn\.(bias|masked_bias)"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": HFParameterNames("model.", _phi3(), _LLAMA.buffer_pattern),
    "opt": HFParameterNames("model.", _opt(), r"decoder\.version"),
    "bloom": HFParameterNames("transformer.", _bloom(), ""),
}
