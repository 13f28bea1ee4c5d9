"""What Hugging Face calls our tensors, one table a family; it stays here.

GPT-2 stores its matrices (in, out) (Conv1D) with q, k and v side by side in `c_attn`; Phi-3 stores q, k and v
one after another, gate and up too; BLOOM stores q, k and v by turns, a head of each; OPT's positions begin
with two rows that no token reads; the other families store all as torch does. Used by hf.py, in both
directions.
"""
from dataclasses import dataclass

from nanoinfra.model.weights.tensor_sources import Source

HEAD = "lm_head.weight"                      # carries no prefix, in any family
QKV, GATE_UP = ("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up")


@dataclass(frozen=True)
class Names:
    """How the tensors of one family are called."""
    prefix: str                              # before every name but the head's
    tensors: dict[str, Source]               # ours -> theirs; {i} is a layer
    buffers: str                             # names that are no weights, as a regular expression


def _both(ours, theirs, **how):
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}", **(how if kind == "weight" else {})) for kind in
            ("weight", "bias")}


def _block(names, layer):
    found = {}
    for ours, theirs in names.items():
        found |= _both(f"blocks.{{i}}.{ours}", f"{layer}.{{i}}.{theirs}")
    return found


def _gpt2():
    tensors = {"embed.weight": Source("wte.weight"), "positions.weight": Source("wpe.weight"),
               "head.weight": Source(HEAD), **_both("norm", "ln_f"),
               **_block({"norm1": "ln_1", "norm2": "ln_2"}, "h")}
    for ours, theirs in {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}.items():
        tensors |= _both(f"blocks.{{i}}.{ours}", f"h.{{i}}.{theirs}", transposed=True)
    for ours in QKV:
        tensors[f"blocks.{{i}}.{ours}.weight"] = Source("h.{i}.attn.c_attn.weight", True, QKV)
        tensors[f"blocks.{{i}}.{ours}.bias"] = Source("h.{i}.attn.c_attn.bias", False, QKV)
    return tensors


def _llama():
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    block |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    block |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}      # Qwen3 alone has these
    block |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    return {"embed.weight": Source("embed_tokens.weight"), "norm.weight": Source("norm.weight"),
            "head.weight": Source(HEAD), **_block(block, "layers")}


def _phi3():
    tensors = _llama()
    for parts, theirs in ((QKV, "self_attn.qkv_proj"), (GATE_UP, "mlp.gate_up_proj")):
        for ours in parts:
            tensors[f"blocks.{{i}}.{ours}.weight"] = Source(f"layers.{{i}}.{theirs}.weight", fused=parts)
    return tensors


def _opt():
    block = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2",
             "attn.o": "self_attn.out_proj", **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"}}
    return {"embed.weight": Source("decoder.embed_tokens.weight"), "head.weight": Source(HEAD),
            "positions.weight": Source("decoder.embed_positions.weight", before=2),
            **_both("norm", "decoder.final_layer_norm"), **_block(block, "decoder.layers")}


def _bloom():
    block = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
             "attn.o": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
    tensors = {"embed.weight": Source("word_embeddings.weight"), "head.weight": Source(HEAD),
               **_both("embed_norm", "word_embeddings_layernorm"), **_both("norm", "ln_f"),
               **_block(block, "h")}
    for turn, ours in enumerate(QKV):
        for kind in ("weight", "bias"):
            fused = Source(f"h.{{i}}.self_attention.query_key_value.{kind}", turn=turn)
            tensors[f"blocks.{{i}}.{ours}.{kind}"] = fused
    return tensors


_LLAMA = Names("model.", _llama(), r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
NAMES = {
    "gpt2": Names("transformer.", _gpt2(), r"h\.\d+\.attn\.(bias|masked_bias)"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": Names("model.", _phi3(), _LLAMA.buffers),
    "opt": Names("model.", _opt(), r"decoder\.version"),
    "bloom": Names("transformer.", _bloom(), ""),
}
