"""GGUF files in: llama.cpp's one-file format with weights (quantised or not), tokenizer and chat template.

Quantised types are dequantised by the `gguf` package's own code; Q4_1 is d * nibble + m over 32 weights, 5
bits a weight. For architecture "llama", llama.cpp interleaves the two halves of each head's rows of q and
k, so that its RoPE can turn neighbours; that is undone here.  https://github.com/ggml-
org/ggml/blob/master/docs/gguf.md
"""
from pathlib import Path

import numpy as np
import torch

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import Weights, check_names, filled, reader
from nanoinfra.model.gguf_text import build_text
from nanoinfra.model.source import Box, Source, sources
from nanoinfra.model.text import Text, optional

KEYS = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
        "hidden": "feed_forward_length", "context": "context_length"}
EPS = {"gpt2": "attention.layer_norm_epsilon", "llama": "attention.layer_norm_rms_epsilon",
       "qwen3": "attention.layer_norm_rms_epsilon"}
PARTS = {"norm1": "attn_norm", "norm2": "ffn_norm", "attn.o": "attn_output", "attn.q_norm": "attn_q_norm",
         "attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down"}


def load_gguf(file: str | Path, dtype: torch.dtype = torch.float32,
              attention: str = "sdpa") -> tuple[Decoder, Text, str | None]:
    """Model, tokenizer and chat template (None where there is none) of a GGUF file.

    Raises ValueError naming what is unknown, missing, surplus or misshapen.
    """
    weights = open_gguf(file)
    return filled(weights.config, attention, dtype, weights.read), weights.text, weights.template


def open_gguf(file: str | Path) -> Weights:
    """The weights of a GGUF file, to be read whole or in parts; raises as `load_gguf` does."""
    gguf_file = _open(file)
    fields = {name: field.contents for name, field in gguf_file.fields.items()}
    tensors = {tensor.name: tensor for tensor in gguf_file.tensors}
    try:
        config = read_config(fields, tensors)
        found = sources(config, _names(config.family))
        check_names({source.name for source in found.values()}, tensors, "it")
        read = reader(config, found, lambda name: tuple(map(int, reversed(tensors[name].shape))),
                      lambda name, box: _fetch(tensors[name], box, config))
        text = build_text(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Weights(config, read, text, _get(fields, "tokenizer.chat_template", None))


def read_config(fields: dict, tensors: dict) -> ModelConfig:
    """The ModelConfig of an open GGUF file's `fields` ({key: function that reads it}) and tensors."""
    family = _get(fields, "general.architecture")
    if family not in EPS:
        raise ValueError(f"architecture {family!r} is unknown; known are {', '.join(EPS)}")
    for refused in ("rope.scaling.type", "expert_count"):
        if _get(fields, f"{family}.{refused}", "none") not in ("none", 0):
            raise ValueError(f"this decoder does not have what {family}.{refused} = "
                             f"{_get(fields, f'{family}.{refused}')!r} asks for")
    given = {ours: _get(fields, f"{family}.{key}") for ours, key in KEYS.items()}
    head_dim = _get(fields, f"{family}.attention.key_length", given["width"] // given["heads"])
    if _get(fields, f"{family}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"by {family}.rope.dimension_count RoPE turns part of a head's {head_dim}; "
                         "this decoder turns all")
    return ModelConfig(
        vocab=len(_get(fields, "tokenizer.ggml.tokens")), head_dim=head_dim, family=family,
        kv_heads=_get(fields, f"{family}.attention.head_count_kv", given["heads"]),
        tied="output.weight" not in tensors, eps=_short(_get(fields, f"{family}.{EPS[family]}")),
        theta=_short(_get(fields, f"{family}.rope.freq_base", 10000.0)), **given)


def _open(file):
    gguf = optional("gguf", "GGUF files")
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}")
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file} cannot be read as GGUF: {error}") from error


def _get(fields, key, *default):
    if key in fields:
        return fields[key]()
    if not default:
        raise ValueError(f"the key {key} is missing")
    return default[0]


def _short(x):
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _names(family):
    table = {f"blocks.{{i}}.{ours}.{kind}": Source(f"blk.{{i}}.{theirs}.{kind}")
             for ours, theirs in PARTS.items() for kind in ("weight", "bias")}
    qkv = Source("blk.{i}.attn_qkv", fused=("attn.q", "attn.k", "attn.v"))
    for x in "qkv":
        fused = qkv if family == "gpt2" else Source(f"blk.{{i}}.attn_{x}")
        table |= {f"blocks.{{i}}.attn.{x}.{kind}": fused._replace(name=f"{fused.name}.{kind}")
                  for kind in ("weight", "bias")}
    for ours, theirs in {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm",
                         "head": "output"}.items():
        table |= {f"{ours}.{kind}": Source(f"{theirs}.{kind}") for kind in ("weight", "bias")}
    return table


def _fetch(stored, box, config):
    """The part `box` of a stored tensor (out, in), its rows in our order."""
    if any(part.start == part.stop for part in box):                      # numpy cannot shape no blocks
        return torch.empty([part.stop - part.start for part in box])
    if config.family != "llama" or not stored.name.endswith(("attn_q.weight", "attn_k.weight")):
        return dequantized(stored, box)
    (start, stop), K = (box[0].start, box[0].stop), config.head_dim
    first = start // K * K
    heads = dequantized(stored, (slice(first, -(-stop // K) * K), *box[1:]))   # a row's place is its head's
    return halves_from_pairs(heads, K)[start - first:stop - first]


def dequantized(stored, box: Box) -> torch.Tensor:
    """The part `box` of a tensor of GGUFReader, float32, from no more blocks than hold it.

    A block is a stretch of a row: 32 or 256 weights, which share their scale.
    """
    import gguf
    size, nbytes = gguf.GGML_QUANT_SIZES[stored.tensor_type]
    items = nbytes // stored.data.itemsize                                # of a block, as the array has them
    *rows, columns = box
    first = columns.start // size
    blocks = slice(first * items, -(-columns.stop // size) * items)
    x = torch.tensor(gguf.dequantize(np.ascontiguousarray(stored.data[(*rows, blocks)]), stored.tensor_type))
    return x[..., columns.start - first * size:columns.stop - first * size]


def halves_from_pairs(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k (heads * K, C) back from llama.cpp's order (0, K/2, 1, K/2 + 1, ...) of each head."""
    pairs = x.view(-1, head_dim // 2, 2, *x.shape[1:])                    # (H, K/2, 2, C)
    return pairs.transpose(1, 2).reshape(x.shape)                         # (H, 2, K/2, C)
