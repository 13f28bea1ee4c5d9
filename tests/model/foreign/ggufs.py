"""GGUF files written byte by byte: every type, the architectures people bring, and every way to be broken.

The file holds random blocks of a type; what the gguf package dequantises them to is what transformers' model
is given. Broken files have no counterpart: they are refused, or open and run.
"""
import random
import struct
from functools import partial

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from nanoinfra.model.load import load
from tests.model.foreign.judge import Case, Fault, ours, seed
from tests.model.foreign.models import built, compare, raw

FILE, ALIGN = "model.gguf", 32
TYPES = [Type.F32, Type.F16, Type.BF16, *(kind for kind in gguf.quants._type_traits if kind != Type.BF16)]
UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
PACKED = {UINT32: "<I", FLOAT32: "<f", BOOL: "<?", UINT64: "<Q", 5: "<i", 0: "<B", 12: "<d", 11: "<q"}
NAMES = {"model.": "", "transformer.": "", "embed_tokens": "token_embd", "wte": "token_embd",
    "wpe": "position_embd",
         "ln_f": "output_norm", "lm_head": "output", "layers": "blk", "h.": "blk.",
         "self_attn.o_proj": "attn_output",
         "self_attn.qkv_proj": "attn_qkv", "self_attn.": "attn_", "post_attention_layernorm": "ffn_norm",
         "input_layernorm": "attn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up",
         "mlp.c_proj": "ffn_down",
         "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_1": "attn_norm", "ln_2": "ffn_norm",
         "mlp.":
         "ffn_", "_proj": ""}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "phi3")
PIECES = ["t", "1", *(f"t{i}" for i in range(59))]


def gguf_cases() -> list[Case]:
    """Types, architectures, fields, and bytes that are broken."""
    made = [_case(f"llama as {kind.name}", "llama", kind, wide=True, must=kind.name.startswith(("F", "BF",
        "Q")))
            for kind in TYPES]
    made += [_case(f"{family} tied={tied}", family, Type.F32, must=family != "phi3", tie_word_embeddings=tied)
             for family in ARCHITECTURES for tied in (True, False)]
    made += [_broken(f"{key} = {name}", partial(_field, key=key, value=value)) for key in KEYS
             for name, value in VALUES.items()]
    made += [_broken(name, change) for name, change in BROKEN.items()]
    made += [_broken(f"cut {n}", partial(_cut, part=n / 24)) for n in range(24)]
    made += [_broken(f"flip {n}", partial(_flip, name=f"gguf flip {n}")) for n in range(200)]
    return made + [_broken(f"noise {n}", partial(_noise, name=f"gguf noise {n}")) for n in range(60)]


def _case(name, family, kind, wide=False, must=False, **edits):
    """A model of the stored weights, which are random blocks, beside the file; compared when judged."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1} if wide else {}
    config = raw(family, **sizes, **edits)

    def judge(folder):
        other = built(config)
        (folder / FILE).write_bytes(spelled(_fields(config), _tensors(other, family, kind)))
        return compare(ours(load, folder / FILE)[0], other)
    return Case(f"gguf {name}", lambda folder: None, judge, True, must)


@torch.no_grad()
def _tensors(other, family, kind):
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
    data = np.concatenate(blocks)[:x.numel() // size].reshape(shape[0], -1)
    return data.tobytes(), torch.from_numpy(np.array(gguf.dequantize(data, kind))).float().reshape(shape)


def _fields(config):
    """{key: (type, value)} of a file's header."""
    family, get = config["model_type"], lambda *keys: next(config[key] for key in keys if key in config)
    fields = {
        "general.architecture": (STRING, family), "general.alignment": (UINT32, ALIGN),
        f"{family}.context_length": (UINT32, get("max_position_embeddings", "n_positions")),
        f"{family}.embedding_length": (UINT32, get("hidden_size", "n_embd")),
        f"{family}.block_count": (UINT32, get("num_hidden_layers", "n_layer")),
        f"{family}.feed_forward_length": (UINT32, get("intermediate_size", "n_inner")),
        f"{family}.attention.head_count": (UINT32, get("num_attention_heads", "n_head")),
        "tokenizer.ggml.model": (STRING, "gpt2"), "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, PIECES)), "tokenizer.ggml.merges": (ARRAY, (STRING,
        ["t 1"])),
        "tokenizer.ggml.token_type": (ARRAY, (5, [1] * len(PIECES))), "tokenizer.ggml.bos_token_id": (UINT32,
        1),
        "tokenizer.ggml.eos_token_id": (UINT32, 2), "tokenizer.chat_template": (STRING, "{{ messages }}"),
    }
    if family == "gpt2":
        return fields | {"gpt2.attention.layer_norm_epsilon": (FLOAT32, 1e-5)}
    fields |= {f"{family}.attention.layer_norm_rms_epsilon": (FLOAT32, 1e-5),
        f"{family}.rope.freq_base": (FLOAT32, 500.0),
               f"{family}.attention.head_count_kv": (UINT32, 2)}
    return fields | ({f"{family}.attention.key_length": (UINT32, 12),
        f"{family}.attention.value_length": (UINT32, 12)}
                     if family == "qwen3" else {})


def spelled(fields, tensors, version=3, counts=None, magic=b"GGUF") -> bytes:
    """A GGUF file of these fields and tensors."""
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head, data = magic + struct.pack("<IQQ", version, tensor_count, field_count), b""
    head += b"".join(_string(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind,
        value) in fields.items())
    for name, (shape, kind, values) in tensors.items():
        data += b"\0" * (-len(data) % ALIGN)
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), int(kind),
            len(data))
        data += values
    return head + b"\0" * (-len(head) % ALIGN) + data


def _string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(kind, value):
    if isinstance(value, bytes) and kind != STRING:
        return value                         # as it is
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return _string(value) if kind == STRING else struct.pack(PACKED[kind], value)


_whole = {}


def _parts():
    """Fields and tensors of a small file that opens; built once."""
    if not _whole:
        config = raw("llama")
        _whole.update(fields=_fields(config), tensors=_tensors(built(config), "llama", Type.F32))
    return dict(_whole["fields"]), dict(_whole["tensors"])


def _broken(name, change):
    """`change(fields, tensors)` gives the bytes."""
    def make(folder):
        (folder / FILE).write_bytes(change(*_parts()))
    return Case(f"gguf {name}", make, _runs)


def _runs(folder):
    model, text, _ = ours(load, folder / FILE)
    if text is not None:
        ours(text.decode, ours(text.encode, "t1 t2 x"))
    n = min(8, model.config.context)
    logits = ours(model, torch.arange(n)[None] % model.config.vocab)
    if logits.shape != (1, n, model.config.vocab):
        raise Fault(f"logits of shape {tuple(logits.shape)}")
    return "opened"


def _field(fields, tensors, key, value):
    key = key.replace("*", "llama")
    if value is None:
        fields.pop(key, None)
    else:
        fields[key] = value
    return spelled(fields, tensors)


KEYS = ("general.architecture", "general.alignment", "*.context_length", "*.embedding_length",
    "*.block_count",
        "*.feed_forward_length", "*.attention.head_count", "*.attention.head_count_kv", "*.rope.freq_base",
        "*.attention.layer_norm_rms_epsilon", "*.attention.key_length", "*.attention.value_length",
        "*.vocab_size",
        "*.rope.dimension_count", "*.rope.scaling.type", "*.rope.scaling.factor",
        "*.attention.sliding_window",
        "*.expert_count", "*.attention.causal", "*.rope.scaling.original_context_length",
        "*.rope.scaling.attn_factor",
        "*.attention.scale", "*.attn_logit_softcapping", "*.logit_scale", "*.attention.clamp_kqv",
        "*.use_parallel_residual", "*.attention.max_alibi_bias", "*.unheard_of", "general.file_type",
        "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens", "tokenizer.ggml.merges",
        "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template",
        "split.count")
VALUES = {
    "absent": None, "text": (STRING, "x"), "linear": (STRING, "linear"), "empty": (STRING, ""),
        "zero": (UINT32, 0),
    "one": (UINT32, 1), "seven": (UINT32, 7), "max": (UINT32, 2**32 - 1), "negative": (5, -1),
        "wide": (UINT64, 2**64 - 1),
    "true": (BOOL, True), "half": (FLOAT32, 0.5), "nan": (FLOAT32, float("nan")), "inf": (FLOAT32,
        float("inf")),
    "no array": (ARRAY, (UINT32, [])), "array": (ARRAY, (UINT32, [4, 4])), "words": (ARRAY, (STRING, ["a",
        "b"])),
    "nested": (ARRAY, (ARRAY, [(UINT32, [1])])), "not utf-8": (STRING, b"\xff\xfe"), "type 99": (99,
        b"\0" * 8),
    "long string": (STRING, b"x" * 10**6), "endless string": (ARRAY, struct.pack("<IQ", STRING, 2**62)),
    "endless array": (ARRAY, struct.pack("<IQ", UINT32, 2**62)), "many": (ARRAY, struct.pack("<IQ", 0,
        10**9)),
}


def _tensor(name, change):
    """One tensor's (shape, type, bytes) changed, dropped where None."""
    def made(fields, tensors):
        if (new := change(*tensors[name])) is None:
            del tensors[name]
        else:
            tensors[name] = new
        return spelled(fields, tensors)
    return made


UP, NORM = "blk.0.ffn_up.weight", "output_norm.weight"
BROKEN = {
    "empty": lambda fields, tensors: b"", "text": lambda fields,
        tensors: b"version https://git-lfs.github.com/spec/v1\n",
    "magic": lambda fields, tensors: spelled(fields, tensors, magic=b"GGML"), "zeros": lambda fields,
        tensors: bytes(4096),
    "turned": lambda fields, tensors: b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100),
    **{f"version {n}": partial(lambda fields, tensors, n: spelled(fields, tensors, n), n=n) for n in (0, 1, 2,
        4, 2**31)},
    **{f"counts {n}": partial(lambda fields, tensors, n: spelled(fields, tensors, counts=n), n=n)
       for n in ((0, 0), (1, 10**9), (10**9, 5), (2**63, 2**63), (2**64 - 1, 2), (500, 19))},
    "no tensors": lambda fields, tensors: spelled(fields, {}), "no fields": lambda fields,
        tensors: spelled({}, tensors),
    "missing": _tensor(UP, lambda *x: None), "missing norm": _tensor(NORM, lambda *x: None),
    "turned matrix": _tensor(UP, lambda shape, kind, data: (shape[::-1], kind, data)),
    "flat": _tensor(UP, lambda shape, kind, data: ((44 * 32,), kind, data)), "no dims": _tensor(
        UP, lambda shape, kind, data: ((), kind, data)), "zero rows": _tensor(UP, lambda s, k, d: ((0, 32), k,
            b"")),
    "many dims": _tensor(UP, lambda shape, kind, data: ((1,) * 40 + shape, kind, data)),
    "huge dims": _tensor(UP, lambda s, k, d: ((2**40, 2**40), k, d)), "wrapped": _tensor(
        UP, lambda s, k, d: ((2**63, 2), k, d)), "no data": _tensor("output.weight", lambda s, k, d: (s, k,
            b"")),
    **{f"type {n}": _tensor(UP, partial(lambda s, k, d, n: (s, n, d), n=n)) for n in (4, 15, 18, 24, 28, 36,
        99, 2**31)},
    "quantised row": _tensor(UP, lambda s, k, d: (s, Type.Q4_K, d)), "surplus": lambda fields,
        tensors: spelled(
        fields, tensors | {"surplus.weight": tensors[NORM]}), "rope factors": lambda fields, tensors: spelled(
        fields, tensors | {"rope_freqs.weight": ((4,), Type.F32, np.ones(4, np.float32).tobytes())}),
    "bias": lambda fields, tensors: spelled(fields, tensors | {"blk.0.attn_q.bias": tensors[NORM]}),
    "twice the tensor": lambda fields, tensors: _twice(spelled(fields, tensors), b"blk.0.attn_k.weight",
        b"blk.0.attn_q.weight"),
    "twice the key": lambda fields, tensors: _twice(spelled(fields, tensors), b"llama.block_count",
        b"llama.context_len"),
    "trailing": lambda fields, tensors: spelled(fields, tensors) + bytes(1000),
}


def _twice(data, one, other):
    return data.replace(one, other, 1)


def _cut(fields, tensors, part):
    whole = spelled(fields, tensors)
    return whole[:int(len(whole) * part)]


def _flip(fields, tensors, name):
    whole, draws = bytearray(spelled(fields, tensors)), random.Random(seed(name))
    whole[draws.randrange(len(spelled(fields, {})) + 1500)] ^= 1 << draws.randrange(8)
    return bytes(whole)


def _noise(fields, tensors, name):
    whole, draws = bytearray(spelled(fields, tensors)), random.Random(seed(name))
    at, length = draws.randrange(len(spelled(fields, {}))), draws.randrange(1, 9)
    whole[at:at + length] = draws.randbytes(length)
    return bytes(whole)
