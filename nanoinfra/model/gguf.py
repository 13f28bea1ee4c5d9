"""GGUF files in: llama.cpp's one-file format with weights (quantised or not), tokenizer and chat template.

Quantised types are dequantised by the `gguf` package's own code; Q4_1 is d * nibble + m over 32 weights, 5
bits a weight. For architecture "llama", llama.cpp interleaves the two halves of each head's rows of q and
k, so that its RoPE can turn neighbours; that is undone here. Rows of q, k and v that lie in one tensor are
read as three (gguf_file.py knows the bytes, gguf_config.py the keys, gguf_text.py the tokenizer).
"""
from pathlib import Path

import torch

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import Weights, check_names, filled, reader
from nanoinfra.model.gguf_config import LINEAR, Keys, architecture_of, biased, read_config
from nanoinfra.model.gguf_file import GGUFFile, Stored, block_of, read_gguf
from nanoinfra.model.gguf_text import build_text
from nanoinfra.model.source import Source, sources
from nanoinfra.model.text import Text

BLOCK = {"norm1": "attn_norm", "norm2": "ffn_norm", "attn.q_norm": "attn_q_norm",
         "attn.k_norm": "attn_k_norm"}
OUTER = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm", "head": "output"}
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
        config, tensors = _described(opened)
        found = sources(config, _names())
        check_names({source.name for source in found.values()}, tensors, "it")
        read = reader(config, found, lambda name: tensors[name].shape,
                      lambda name, box: _fetch(opened, name, tensors[name], box, config, architecture))
        text = build_text(opened.fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Weights(config, read, text, Keys(opened.fields).get("tokenizer.chat_template", str, None))


def _described(opened: GGUFFile) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration, and the tensors that hold its parameters, those of fused ones apart."""
    tensors = dict(opened.tensors)
    factors = tensors.pop(FACTORS, None) if architecture_of(opened.fields) == "llama" else None
    if factors is not None and len(factors.shape) != 1:
        raise ValueError(f"{FACTORS} has the shape {factors.shape}, not one of a number for each pair")
    numbers = [] if factors is None else opened.read(factors, (slice(0, factors.shape[0]),)).tolist()
    config = read_config(opened.fields, tensors, numbers)
    if config.layers > len(tensors):         # before anybody lists what each layer has
        raise ValueError(f"it has {len(tensors)} tensors, too few for {config.layers} layers")
    tensors = apart(tensors, config)
    return biased(config, set(tensors)), tensors


def apart(tensors: dict[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """The tensors with each fused one as those that lie in it, one after the other, by their usual names."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    fused = {"attn_qkv": {"attn_q": queries, "attn_k": keys, "attn_v": keys}}
    if config.family == "phi3":
        fused["ffn_up"] = {"ffn_gate": config.hidden, "ffn_up": config.hidden}
    found = {}
    for name, tensor in tensors.items():
        *layer, part, kind = name.split(".")
        rows = fused.get(part)
        if rows is None:
            found[name] = tensor
            continue
        if sum(rows.values()) != tensor.shape[0] or len(tensor.shape) == 1 and block_of(tensor.kind)[0] > 1:
            want = " + ".join(map(str, rows.values()))
            raise ValueError(f"{name} has {tensor.shape[0]} rows, but the keys say {want}")
        first = 0
        for ours, count in rows.items():
            found[".".join([*layer, ours, kind])] = tensor.rows(first, count)
            first += count
    return found


def _names():
    """Where each of our parameters lies, layers as {i}."""
    blocks = BLOCK | {f"{'attn' if x in 'qkvo' else 'mlp'}.{x}": theirs for x, theirs in LINEAR.items()}
    names = {f"blocks.{{i}}.{ours}": f"blk.{{i}}.{theirs}" for ours, theirs in blocks.items()} | OUTER
    return {f"{ours}.{kind}": Source(f"{theirs}.{kind}") for ours, theirs in names.items()
            for kind in ("weight", "bias")}


def _fetch(opened, name, stored, box, config, architecture):
    """The part `box` of a stored tensor (out, in), its rows in our order."""
    if any(part.start == part.stop for part in box):                      # numpy cannot shape no blocks
        return torch.empty([part.stop - part.start for part in box])
    if architecture != "llama" or name.split(".")[-2] not in ("attn_q", "attn_k"):
        return opened.read(stored, box)
    (start, stop), K = (box[0].start, box[0].stop), config.head_dim
    first = start // K * K
    heads = opened.read(stored, (slice(first, -(-stop // K) * K), *box[1:]))   # a row's place is its head's
    return halves_from_pairs(heads, K)[start - first:stop - first]


def halves_from_pairs(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (heads * K, C) back from llama.cpp's order (0, K/2, 1, K/2 + 1, ...) of each head.

    A bias (heads * K,) likewise.
    """
    pairs = x.view(-1, head_dim // 2, 2, *x.shape[1:])                    # (H, K/2, 2, C)
    return pairs.transpose(1, 2).reshape(x.shape)                         # (H, 2, K/2, C)
