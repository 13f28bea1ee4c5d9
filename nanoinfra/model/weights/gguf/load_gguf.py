"""Read GGUF files, llama.cpp's one-file format: weights (quantized or not), tokenizer and chat template.

The `gguf` package dequantizes; Q4_1 is d * nibble + m over 32 weights, 5 bits a weight. For architecture
"llama", llama.cpp interleaves the two halves of each head's rows of q and k, because its RoPE rotates
neighbours; that is undone here. file_format.py reads the bytes, config.py the metadata, tokenizer.py the
tokenizer.
"""
from collections.abc import Collection
from pathlib import Path

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.gguf.config import (
    GGUF_LINEAR_NAMES,
    GGUFMetadata,
    gguf_architecture,
    model_config_from_gguf,
)
from nanoinfra.model.weights.gguf.file_format import GGUFFile, open_gguf_file
from nanoinfra.model.weights.gguf.tokenizer import build_gguf_tokenizer
from nanoinfra.model.weights.map_parameters_to_stored_tensors import TensorSource, parameter_sources
from nanoinfra.model.weights.read_weights_into_decoder import (
    PretrainedWeights,
    build_filled_decoder,
    check_tensor_names,
    parameter_reader,
)

_BLOCK_NAMES = {"norm1": "attn_norm", "norm2": "ffn_norm", "attn.q_norm": "attn_q_norm",
                "attn.k_norm": "attn_k_norm"}
_OUTER_NAMES = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
FUSED_GGUF_TENSORS = {"attn_qkv": ("attn.q", "attn.k", "attn.v"), "ffn_up": ("mlp.gate", "mlp.up")}
ROPE_FACTORS_TENSOR = "rope_freqs.weight"    # Llama 3.1's RoPE factors, one for each pair


def load_gguf_model(file: str | Path, dtype: torch.dtype = torch.float32,
                    attention: str = "sdpa") -> tuple[Decoder, Tokenizer, str | None]:
    """Load (model, tokenizer, chat template) of a GGUF file; the template is None where there is none.

    Raises ValueError naming what is unknown or missing, what is there beside it, and wrong shapes.
    """
    weights = open_gguf_weights(file)
    model = build_filled_decoder(weights.config, attention, dtype, weights.read_parameter)
    return model, weights.tokenizer, weights.chat_template


def open_gguf_weights(file: str | Path) -> PretrainedWeights:
    """Open the weights of a GGUF file, to be read whole or in parts; raises as `load_gguf_model` does."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        opened = open_gguf_file(file)
        architecture = gguf_architecture(opened.metadata)
        if not opened.tensors:
            raise ValueError("it holds a vocabulary and no weights; give the whole model's file")
        config, used = _described(opened, architecture)
        found = parameter_sources(config, _names(opened.tensors, architecture))
        check_tensor_names({source.stored_name for source in found.values()} | used, opened.tensors, "it")
        read_parameter = parameter_reader(
            config, found, lambda name: opened.tensors[name].shape,
            lambda name, slices: _read_stored(opened, name, slices, config, architecture))
        tokenizer = build_gguf_tokenizer(opened.metadata)
        chat_template = GGUFMetadata(opened.metadata).get_typed("tokenizer.chat_template", str, None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return PretrainedWeights(config, read_parameter, tokenizer, chat_template)


def _described(opened: GGUFFile, architecture: str) -> tuple[ModelConfig, set[str]]:
    """The configuration, and the names of tensors that belong to it and are no parameters."""
    factors, used = [], set()
    name = ROPE_FACTORS_TENSOR
    if architecture == "llama" and name in opened.tensors:                # llama.cpp reads no other's
        if len(shape := opened.tensors[name].shape) != 1:
            raise ValueError(f"{name} has the shape {shape}, not one of a number for each pair")
        factors, used = opened.dequantize_slices(name, (slice(0, shape[0]),)).tolist(), {name}
    config = model_config_from_gguf(opened.metadata, opened.tensors, factors)
    if config.layers > len(opened.tensors):  # before the parameters of so many layers are listed
        raise ValueError(f"it has {len(opened.tensors)} tensors, too few for {config.layers} layers")
    return config, used


def _names(tensors: Collection[str], architecture: str) -> dict[str, TensorSource]:
    """Where each of our parameters lies, layers as {i}; q, k and v are one tensor if the file fuses them."""
    blocks = _BLOCK_NAMES | {f"{'attn' if x in 'qkvo' else 'mlp'}.{x}": theirs
                             for x, theirs in GGUF_LINEAR_NAMES.items()}
    names = {f"blocks.{{i}}.{ours}": TensorSource(f"blk.{{i}}.{theirs}") for ours, theirs in blocks.items()}
    for theirs, fused in FUSED_GGUF_TENSORS.items():
        if theirs == "ffn_up" and architecture != "phi3" or f"blk.0.{theirs}.weight" not in tensors:
            continue
        source = TensorSource(f"blk.{{i}}.{theirs}", fused_linears=fused)
        names |= {f"blocks.{{i}}.{linear}": source for linear in fused}
    names |= {ours: TensorSource(theirs) for ours, theirs in _OUTER_NAMES.items()}
    return {f"{ours}.{kind}": source._replace(stored_name=f"{source.stored_name}.{kind}")
            for ours, source in names.items() for kind in ("weight", "bias")}


def _read_stored(opened, name, slices, config, architecture):
    """A part of a stored tensor (out, in), its rows in our order."""
    if any(part.start == part.stop for part in slices):                   # numpy cannot reshape an empty one
        return torch.empty([part.stop - part.start for part in slices])
    (start, stop), K = (slices[0].start, slices[0].stop), config.head_dim
    interleaved_heads = {"attn_q": config.heads, "attn_k": config.kv_heads,
                         "attn_qkv": config.heads + config.kv_heads}
    if architecture != "llama" or start >= interleaved_heads.get(name.split(".")[-2], 0) * K:
        return opened.dequantize_slices(name, slices)
    first = start // K * K
    whole_heads = slice(first, -(-stop // K) * K)                         # rows move within their head
    heads = opened.dequantize_slices(name, (whole_heads, *slices[1:]))
    return deinterleave_rope_rows(heads, K)[start - first:stop - first]


def deinterleave_rope_rows(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's order of each head's rows of q or k: (0, K/2, 1, K/2 + 1, ...).

    `x` is a weight (heads * K, C) or a bias (heads * K,).
    """
    pairs = x.view(-1, head_dim // 2, 2, *x.shape[1:])                    # (H, K/2, 2, C)
    return pairs.transpose(1, 2).reshape(x.shape)                         # (H, 2, K/2, C)
