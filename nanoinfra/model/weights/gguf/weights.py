"""GGUF files in: llama.cpp's one-file format with weights (quantised or not), tokenizer and chat template.

Quantised types are dequantised by the `gguf` package's own code; Q4_1 is d * nibble + m over 32 weights, 5
bits a weight. For architecture "llama", llama.cpp interleaves the two halves of each head's rows of q and
k, so that its RoPE can turn neighbours; that is undone here. (gguf_file.py knows the bytes, gguf_config.py
the keys, gguf_text.py the tokenizer.)
"""
from collections.abc import Collection
from pathlib import Path

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.fill_model import Weights, check_names, filled, reader
from nanoinfra.model.weights.gguf.config import LINEAR, Keys, architecture_of, read_config
from nanoinfra.model.weights.gguf.file_format import GGUFFile, read_gguf
from nanoinfra.model.weights.gguf.tokenizer import build_text
from nanoinfra.model.weights.tensor_sources import Source, sources

BLOCK = {"norm1": "attn_norm", "norm2": "ffn_norm", "attn.q_norm": "attn_q_norm",
         "attn.k_norm": "attn_k_norm"}
OUTER = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
FUSED = {"attn_qkv": ("attn.q", "attn.k", "attn.v"), "ffn_up": ("mlp.gate", "mlp.up")}
FACTORS = "rope_freqs.weight"                # Llama 3.1's, one for each pair


def load_gguf(file: str | Path, dtype: torch.dtype = torch.float32,
              attention: str = "sdpa") -> tuple[Decoder, Text, str | None]:
    """Model, tokenizer and chat template (None where there is none) of a GGUF file.

    Raises ValueError naming what is unknown, missing, surplus or misshapen.
    """
    weights = open_gguf(file)
    return filled(weights.config, attention, dtype, weights.read), weights.text, weights.template


def open_gguf(file: str | Path) -> Weights:
    """The weights of a GGUF file, to be read whole or in parts; raises as `load_gguf` does."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        opened = read_gguf(file)
        architecture = architecture_of(opened.fields)
        if not opened.tensors:
            raise ValueError("it holds a vocabulary and no weights; give the whole model's file")
        config, used = _described(opened, architecture)
        found = sources(config, _names(opened.tensors, architecture))
        check_names({source.name for source in found.values()} | used, opened.tensors, "it")
        read = reader(config, found, lambda name: opened.tensors[name].shape,
                      lambda name, box: _fetch(opened, name, box, config, architecture))
        text = build_text(opened.fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Weights(config, read, text, Keys(opened.fields).get("tokenizer.chat_template", str, None))


def _described(opened: GGUFFile, architecture: str) -> tuple[ModelConfig, set[str]]:
    """The configuration, and the names of tensors that are no parameters but part of it."""
    factors, used = [], set()
    if architecture == "llama" and FACTORS in opened.tensors:             # for others llama.cpp reads none
        if len(shape := opened.tensors[FACTORS].shape) != 1:
            raise ValueError(f"{FACTORS} has the shape {shape}, not one of a number for each pair")
        factors, used = opened.read(FACTORS, (slice(0, shape[0]),)).tolist(), {FACTORS}
    config = read_config(opened.fields, opened.tensors, factors)
    if config.layers > len(opened.tensors):  # before anybody lists what each layer has
        raise ValueError(f"it has {len(opened.tensors)} tensors, too few for {config.layers} layers")
    return config, used


def _names(tensors: Collection[str], architecture: str) -> dict[str, Source]:
    """Where each of our parameters lies, layers as {i}; q, k and v in one tensor where the file has that."""
    blocks = BLOCK | {f"{'attn' if x in 'qkvo' else 'mlp'}.{x}": theirs for x, theirs in LINEAR.items()}
    names = {f"blocks.{{i}}.{ours}": Source(f"blk.{{i}}.{theirs}") for ours, theirs in blocks.items()}
    for theirs, fused in FUSED.items():
        if theirs == "ffn_up" and architecture != "phi3" or f"blk.0.{theirs}.weight" not in tensors:
            continue
        names |= {f"blocks.{{i}}.{x}": Source(f"blk.{{i}}.{theirs}", fused=fused) for x in fused}
    names |= {ours: Source(theirs) for ours, theirs in OUTER.items()}
    return {f"{ours}.{kind}": source._replace(name=f"{source.name}.{kind}") for ours, source in names.items()
            for kind in ("weight", "bias")}


def _fetch(opened, name, box, config, architecture):
    """The part `box` of a stored tensor (out, in), its rows in our order."""
    if any(part.start == part.stop for part in box):                      # numpy cannot shape no blocks
        return torch.empty([part.stop - part.start for part in box])
    (start, stop), K = (box[0].start, box[0].stop), config.head_dim
    turned = {"attn_q": config.heads, "attn_k": config.kv_heads, "attn_qkv": config.heads + config.kv_heads}
    if architecture != "llama" or start >= turned.get(name.split(".")[-2], 0) * K:
        return opened.read(name, box)
    first = start // K * K
    heads = opened.read(name, (slice(first, -(-stop // K) * K), *box[1:]))     # a row's place is its head's
    return halves_from_pairs(heads, K)[start - first:stop - first]


def halves_from_pairs(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (heads * K, C) back from llama.cpp's order (0, K/2, 1, K/2 + 1, ...) of each head.

    A bias (heads * K,) likewise.
    """
    pairs = x.view(-1, head_dim // 2, 2, *x.shape[1:])                    # (H, K/2, 2, C)
    return pairs.transpose(1, 2).reshape(x.shape)                         # (H, 2, K/2, C)
