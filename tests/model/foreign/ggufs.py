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

from nanoinfra.model.weights.load_model import load_model
from tests.model.foreign.gguf_files import (
    ARRAY,
    BOOL,
    FILE,
    FLOAT32,
    STRING,
    UINT32,
    UINT64,
    header_fields,
    spelled,
    stored_tensors,
)
from tests.model.foreign.judge import Case, Fault, ours, seed
from tests.model.foreign.models import built, compare, raw

TYPES = [Type.F32, Type.F16, Type.BF16, *(kind for kind in gguf.quants._type_traits if kind != Type.BF16)]
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "phi3")


def gguf_cases() -> list[Case]:
    """Types, architectures, fields, and bytes that are broken."""
    made = [
        _case(f"llama as {kind.name}", "llama", kind, wide=True, must=kind.name.startswith(("F", "BF", "Q")))
        for kind in TYPES
    ]
    made += [
        _case(f"{family} tied={tied}", family, Type.F32, must=family != "phi3", tie_word_embeddings=tied)
        for family in ARCHITECTURES
        for tied in (True, False)
    ]
    made += [
        _broken(f"{key} = {name}", partial(_field, key=key, value=value))
        for key in KEYS
        for name, value in VALUES.items()
    ]
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
        (folder / FILE).write_bytes(spelled(header_fields(config), stored_tensors(other, family, kind)))
        return compare(ours(load_model, folder / FILE)[0], other)

    return Case(f"gguf {name}", lambda folder: None, judge, True, must)


_whole = {}


def _parts():
    """Fields and tensors of a small file that opens; built once."""
    if not _whole:
        config = raw("llama")
        _whole.update(fields=header_fields(config), tensors=stored_tensors(built(config), "llama", Type.F32))
    return dict(_whole["fields"]), dict(_whole["tensors"])


def _broken(name, change):
    """`change(fields, tensors)` gives the bytes."""

    def make(folder):
        (folder / FILE).write_bytes(change(*_parts()))

    return Case(f"gguf {name}", make, _runs)


def _runs(folder):
    model, text, _ = ours(load_model, folder / FILE)
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


KEYS = (
    "general.architecture",
    "general.alignment",
    "*.context_length",
    "*.embedding_length",
    "*.block_count",
    "*.feed_forward_length",
    "*.attention.head_count",
    "*.attention.head_count_kv",
    "*.rope.freq_base",
    "*.attention.layer_norm_rms_epsilon",
    "*.attention.key_length",
    "*.attention.value_length",
    "*.vocab_size",
    "*.rope.dimension_count",
    "*.rope.scaling.type",
    "*.rope.scaling.factor",
    "*.attention.sliding_window",
    "*.expert_count",
    "*.attention.causal",
    "*.rope.scaling.original_context_length",
    "*.rope.scaling.attn_factor",
    "*.attention.scale",
    "*.attn_logit_softcapping",
    "*.logit_scale",
    "*.attention.clamp_kqv",
    "*.use_parallel_residual",
    "*.attention.max_alibi_bias",
    "*.unheard_of",
    "general.file_type",
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.chat_template",
    "split.count",
)
VALUES = {
    "absent": None,
    "text": (STRING, "x"),
    "linear": (STRING, "linear"),
    "empty": (STRING, ""),
    "zero": (UINT32, 0),
    "one": (UINT32, 1),
    "seven": (UINT32, 7),
    "max": (UINT32, 2**32 - 1),
    "negative": (5, -1),
    "wide": (UINT64, 2**64 - 1),
    "true": (BOOL, True),
    "half": (FLOAT32, 0.5),
    "nan": (FLOAT32, float("nan")),
    "inf": (FLOAT32, float("inf")),
    "no array": (ARRAY, (UINT32, [])),
    "array": (ARRAY, (UINT32, [4, 4])),
    "words": (ARRAY, (STRING, ["a", "b"])),
    "nested": (ARRAY, (ARRAY, [(UINT32, [1])])),
    "not utf-8": (STRING, b"\xff\xfe"),
    "type 99": (99, b"\0" * 8),
    "long string": (STRING, b"x" * 10**6),
    "endless string": (ARRAY, struct.pack("<IQ", STRING, 2**62)),
    "endless array": (ARRAY, struct.pack("<IQ", UINT32, 2**62)),
    "many": (ARRAY, struct.pack("<IQ", 0, 10**9)),
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
    "empty": lambda fields, tensors: b"",
    "text": lambda fields, tensors: b"version https://git-lfs.github.com/spec/v1\n",
    "magic": lambda fields, tensors: spelled(fields, tensors, magic=b"GGML"),
    "zeros": lambda fields, tensors: bytes(4096),
    "turned": lambda fields, tensors: b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100),
    **{
        f"version {n}": partial(lambda fields, tensors, n: spelled(fields, tensors, n), n=n)
        for n in (0, 1, 2, 4, 2**31)
    },
    **{
        f"counts {n}": partial(lambda fields, tensors, n: spelled(fields, tensors, counts=n), n=n)
        for n in ((0, 0), (1, 10**9), (10**9, 5), (2**63, 2**63), (2**64 - 1, 2), (500, 19))
    },
    "no tensors": lambda fields, tensors: spelled(fields, {}),
    "no fields": lambda fields, tensors: spelled({}, tensors),
    "missing": _tensor(UP, lambda *x: None),
    "missing norm": _tensor(NORM, lambda *x: None),
    "turned matrix": _tensor(UP, lambda shape, kind, data: (shape[::-1], kind, data)),
    "flat": _tensor(UP, lambda shape, kind, data: ((44 * 32,), kind, data)),
    "no dims": _tensor(UP, lambda shape, kind, data: ((), kind, data)),
    "zero rows": _tensor(UP, lambda s, k, d: ((0, 32), k, b"")),
    "many dims": _tensor(UP, lambda shape, kind, data: ((1,) * 40 + shape, kind, data)),
    "huge dims": _tensor(UP, lambda s, k, d: ((2**40, 2**40), k, d)),
    "wrapped": _tensor(UP, lambda s, k, d: ((2**63, 2), k, d)),
    "no data": _tensor("output.weight", lambda s, k, d: (s, k, b"")),
    **{
        f"type {n}": _tensor(UP, partial(lambda s, k, d, n: (s, n, d), n=n))
        for n in (4, 15, 18, 24, 28, 36, 99, 2**31)
    },
    "quantised row": _tensor(UP, lambda s, k, d: (s, Type.Q4_K, d)),
    "surplus": lambda fields, tensors: spelled(fields, tensors | {"surplus.weight": tensors[NORM]}),
    "rope factors": lambda fields, tensors: spelled(
        fields, tensors | {"rope_freqs.weight": ((4,), Type.F32, np.ones(4, np.float32).tobytes())}
    ),
    "bias": lambda fields, tensors: spelled(fields, tensors | {"blk.0.attn_q.bias": tensors[NORM]}),
    "twice the tensor": lambda fields, tensors: _twice(
        spelled(fields, tensors), b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"
    ),
    "twice the key": lambda fields, tensors: _twice(
        spelled(fields, tensors), b"llama.block_count", b"llama.context_len"
    ),
    "trailing": lambda fields, tensors: spelled(fields, tensors) + bytes(1000),
}


def _twice(data, one, other):
    return data.replace(one, other, 1)


def _cut(fields, tensors, part):
    whole = spelled(fields, tensors)
    return whole[: int(len(whole) * part)]


def _flip(fields, tensors, name):
    whole, draws = bytearray(spelled(fields, tensors)), random.Random(seed(name))
    whole[draws.randrange(len(spelled(fields, {})) + 1500)] ^= 1 << draws.randrange(8)
    return bytes(whole)


def _noise(fields, tensors, name):
    whole, draws = bytearray(spelled(fields, tensors)), random.Random(seed(name))
    at, length = draws.randrange(len(spelled(fields, {}))), draws.randrange(1, 9)
    whole[at : at + length] = draws.randbytes(length)
    return bytes(whole)
