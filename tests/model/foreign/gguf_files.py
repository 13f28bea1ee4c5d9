"""GGUF files written byte by byte, so that they can be wrong as well, from transformers' models.

Quantised tensors are random blocks of a type; what the gguf package makes of them goes into the model.
"""
import struct

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from tests.model.foreign.judge import seed

FILE, ALIGN = "model.gguf", 32
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
PACKED = {UINT32: "<I", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q", 5: "<i", 0: "<B", 12: "<d", 11: "<q"}
NAMES = {
    "model.": "",
    "transformer.": "",
    "embed_tokens": "token_embd",
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "layers": "blk",
    "h.": "blk.",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.": "attn_",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "mlp.": "ffn_",
    "_proj": "",
}
PIECES = ["t", "1", *(f"t{i}" for i in range(59))]


@torch.no_grad()
def stored_tensors(other, family, kind):
    """{name: (shape, type, bytes)} as llama.cpp's converter writes; `other` gets what was stored."""
    found, c = {}, other.config
    for theirs, parameter in other.named_parameters():
        name, turned = theirs, family == "gpt2" and ".c_" in theirs and parameter.dim() == 2
        for a, b in NAMES.items():
            name = name.replace(a, b)
        name = "output_norm.weight" if name == "norm.weight" else name
        shape = tuple(parameter.T.shape if turned else parameter.shape)
        stored = kind if parameter.dim() > 1 else Type.F32
        data, x = _drawn(theirs, shape, stored, parameter.T if turned else parameter)
        if family == "llama" and ("q_proj" in theirs or "k_proj" in theirs):
            heads = c.num_attention_heads if "q_proj" in theirs else c.num_key_value_heads
            x = x.reshape(heads, -1, 2, shape[1]).transpose(1, 2).reshape(shape)
        parameter.copy_(x.T if turned else x)
        found[name] = (shape, stored, data)
    return found


def _drawn(name, shape, kind, x):
    """(bytes, values) of a tensor: `x` itself, or random blocks of finite and small weights."""
    if kind in (Type.F32, Type.F16, Type.BF16):
        data = gguf.quantize(x.detach().contiguous().numpy(), kind)
        return data.tobytes(), torch.from_numpy(np.array(gguf.dequantize(data, kind))).float().reshape(shape)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    draws, blocks = np.random.default_rng(seed(name)), []
    while sum(map(len, blocks)) < x.numel() // size:
        some = draws.integers(0, 256, (4096, nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(some, kind)
            largest = np.abs(values).max(1)  # NaN where any is
            blocks.append(some[(largest < 1) & (largest > 0.01)])
    data = np.concatenate(blocks)[: x.numel() // size].reshape(shape[0], -1)
    return data.tobytes(), torch.from_numpy(np.array(gguf.dequantize(data, kind))).float().reshape(shape)


def header_fields(config):
    """{key: (type, value)} of a file's header."""
    family, get = config["model_type"], lambda *keys: next(config[key] for key in keys if key in config)
    fields = {
        "general.architecture": (STRING, family),
        "general.alignment": (UINT32, ALIGN),
        f"{family}.context_length": (UINT32, get("max_position_embeddings", "n_positions")),
        f"{family}.embedding_length": (UINT32, get("hidden_size", "n_embd")),
        f"{family}.block_count": (UINT32, get("num_hidden_layers", "n_layer")),
        f"{family}.feed_forward_length": (UINT32, get("intermediate_size", "n_inner")),
        f"{family}.attention.head_count": (UINT32, get("num_attention_heads", "n_head")),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, PIECES)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["t 1"])),
        "tokenizer.ggml.token_type": (ARRAY, (5, [1] * len(PIECES))),
        "tokenizer.ggml.bos_token_id": (UINT32, 1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2),
        "tokenizer.chat_template": (STRING, "{{ messages }}"),
    }
    if family == "gpt2":
        return fields | {"gpt2.attention.layer_norm_epsilon": (FLOAT32, 1e-5)}
    fields |= {
        f"{family}.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        f"{family}.rope.freq_base": (FLOAT32, 500.0),
        f"{family}.attention.head_count_kv": (UINT32, 2),
    }
    return fields | (
        {f"{family}.attention.key_length": (UINT32, 12), f"{family}.attention.value_length": (UINT32, 12)}
        if family == "qwen3"
        else {}
    )


def spelled(fields, tensors, version=3, counts=None, magic=b"GGUF") -> bytes:
    """A GGUF file of these fields and tensors."""
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head, data = magic + struct.pack("<IQQ", version, tensor_count, field_count), b""
    head += b"".join(
        _string(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind, value) in fields.items()
    )
    for name, (shape, kind, values) in tensors.items():
        data += b"\0" * (-len(data) % ALIGN)
        head += _string(name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *reversed(shape), int(kind), len(data)
        )
        data += values
    return head + b"\0" * (-len(head) % ALIGN) + data


def _string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind, value):
    if isinstance(value, bytes) and kind != STRING:
        return value  # as it is
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return _string(value) if kind == STRING else struct.pack(PACKED[kind], value)


