"""The same weights in other forms: dtypes, shards, prefixes, names that are missing or too many, files cut.

Each case changes the folder of a base model. Where transformers opens it, so may we, with the same logits.
"""
import json
import os
import random
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.model.foreign.judge import Case, seed
from tests.model.foreign.models import BASES, opens_there, raw, same_logits, write_config, write_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
    "int64": torch.int64,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "complex64": torch.complex64,
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "0" + "\nsize 4096\n"
WELL = {
    "as float16",
    "as bfloat16",
    "as float64",
    "norms as float16",
    "norms as float64",
    "1. as bfloat16",
    "embed as bfloat16",
    "mlp as bfloat16",
    "without prefix",
    "all prefixed",
    "head stored",
    "sharded",
    "both, index whole",
    "both, index stale",
    "bin beside",
}
BUFFERS = {
    "inv_freq stored": ("llama", "mistral", "phi3", "qwen2", "qwen3"),  # as old files hold them
    "causal mask stored": ("gpt2",),
    "masked_bias stored": ("gpt2",),
}
EMBED, HEAD = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight"), "lm_head.weight"


def weight_cases() -> list[Case]:
    """All cases: every change of tensors and of files, in the families it can differ for."""
    made = [
        _case(f"{family} {name}", family, partial(_tensors, change=change), tied)
        for family in BASES
        for tied in (True, False)
        for name, change in _changes(tied).items()
        if name != "missing bias" or family in ("gpt2", "qwen2", "opt", "bloom")
    ]
    made += [_case(f"llama {name}", "llama", change) for name, change in FILES.items()]
    made += [
        _case(f"{family} {name}", family, FILES[name])
        for family in ("gpt2", "opt", "bloom", "phi3")
        for name in ("sharded", "bin only", "pointer", "both, index stale")
    ]
    made += [
        _case(f"llama cut at {at}", "llama", partial(_cut, at=at))
        for at in (0, 1, 7, 8, 9, 40, 500, -1, -4000)
    ]
    made += [_case(f"llama flip {n}", "llama", partial(_flip, name=f"flip {n}")) for n in range(60)]
    made += [
        _case(f"llama length {n}", "llama", partial(_length, n=n))
        for n in (0, 1, 2, 10**6, 2**31, 2**63 - 1, 2**63, 2**64 - 1)
    ]
    return made


def _case(name, family, change, tied=False):
    def make(folder):
        write_model(folder, raw(family, tie_word_embeddings=tied))
        change(folder)

    what = name.partition(" ")[2]
    well = opens_there if what in WELL or family in BUFFERS.get(what, ()) else False
    return Case(f"weights {name}{' tied' * tied}", make, same_logits, well)


def _tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    changed = change(dict(tensors))
    save_file({name: x.contiguous() for name, x in changed.items()}, folder / SINGLE, {"format": "pt"})


def _changes(tied):
    def cast(dtype, only=""):
        return lambda all_: {name: x.to(dtype) if only in name else x for name, x in all_.items()}

    def put(name, like, change=lambda x: x):
        return lambda all_: all_ | {name: change(all_[_one(all_, like)].clone())}

    def drop(like):
        return lambda all_: {name: x for name, x in all_.items() if name != _one(all_, like)}

    every = {f"as {name}": cast(dtype) for name, dtype in DTYPES.items()}
    every |= {f"norms as {name}": cast(DTYPES[name], "norm") for name in ("float16", "int8", "float64")}
    every |= {f"{part} as bfloat16": cast(torch.bfloat16, part) for part in ("1.", "embed", "mlp")}
    every |= {
        "without prefix": lambda all_: {_bare(name): x for name, x in all_.items()},
        "all prefixed": lambda all_: {
            name if name != HEAD else "model." + name: x for name, x in all_.items()
        },
        "twice prefixed": lambda all_: {"model." + name: x for name, x in all_.items()},
        "both spellings": lambda all_: all_ | {_bare(name): x.clone() for name, x in all_.items()},
        "both spellings, one differs": lambda all_: all_ | {_bare(name): x + 1 for name, x in all_.items()},
        "surplus": put("surplus.weight", "weight"),
        "surplus layer": put("model.layers.9.mlp.up_proj.weight", "1."),
        "inv_freq stored": put("model.layers.0.self_attn.rotary_emb.inv_freq", "weight"),
        "causal mask stored": put("transformer.h.0.attn.bias", "weight"),
        "masked_bias stored": put("transformer.h.0.attn.masked_bias", "weight"),
        "missing layer": lambda all_: {name: x for name, x in all_.items() if ".1." not in name},
        "missing embedding": drop(EMBED),
        "missing norm": drop(("norm.weight", "ln_f.weight", "norm1.weight")),
        "missing bias": drop(("bias",)),
        "nothing": lambda all_: {},
        "scalar": put("x", "weight", lambda x: x.sum()),
        "nan": lambda all_: {name: x * float("nan") for name, x in all_.items()},
        "embedding longer": lambda all_: all_ | {_one(all_, EMBED): torch.randn(64, 32)},
        "embedding shorter": lambda all_: all_ | {_one(all_, EMBED): torch.randn(60, 32)},
        "turned": lambda all_: {name: x.mT if x.dim() == 2 else x for name, x in all_.items()},
        "flat": lambda all_: {name: x.flatten() for name, x in all_.items()},
        "empty tensor": put("model.norm.weight", "weight", lambda x: x.flatten()[:0]),
        "quantised beside": put("model.layers.0.mlp.up_proj.weight_scale", "weight"),
    }
    if tied:
        every |= {
            "head stored": put(HEAD, EMBED),
            "head stored, bfloat16": put(HEAD, EMBED, torch.Tensor.bfloat16),
            "head stored, differs": put(HEAD, EMBED, lambda x: x + 1),
            "head stored, misshapen": put(HEAD, EMBED, lambda x: x[:-1]),
        }
    else:
        every |= {
            "head missing": drop((HEAD,)),
            "head longer": lambda all_: all_ | {HEAD: torch.randn(62, 32)},
            "head bias": put("lm_head.bias", "weight", lambda x: x[0]),
        }
    return every


def _one(tensors, ends):
    """The first tensor whose name ends so, or has it in its middle."""
    ends = (ends,) if isinstance(ends, str) else ends
    return next(
        (name for end in ends for name in sorted(tensors) if name.endswith(end) or f".{end}" in name), ""
    )


def _bare(name):
    return name.removeprefix("model.").removeprefix("transformer.")


def _shard(folder, shards=3):
    """Several files under an index; the single one stays."""
    tensors = load_file(folder / SINGLE)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file(
            {name: tensors[name] for name, at in places.items() if at == file},
            folder / file,
            {"format": "pt"},
        )
    return {"metadata": {"total_size": 1}, "weight_map": places}


def _index(folder, change=lambda index: index, keep_single=False):
    index = change(_shard(folder))
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))
    if not keep_single:
        (folder / SINGLE).unlink()


def _mapped(change):
    """An index whose weight_map is changed."""
    return partial(_index, change=lambda index: index | {"weight_map": change(index["weight_map"])})


def _stale(folder):
    """A single file with other weights beside an index."""
    _index(folder, keep_single=True)
    save_file(
        {name: x + 1 for name, x in load_file(folder / SINGLE).items()}, folder / SINGLE, {"format": "pt"}
    )


def _pickled(folder, name="pytorch_model.bin", keep=False):
    torch.save(load_file(folder / SINGLE), folder / name)
    if not keep:
        (folder / SINGLE).unlink()


def _shard_gone(folder):
    _index(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def _written(name, text):
    return lambda folder: (folder / name).write_text(text)


def _cut(folder, at):
    os.truncate(folder / SINGLE, at if at >= 0 else (folder / SINGLE).stat().st_size + at)


def _flip(folder, name):
    """One bit of the header, or of its length."""
    data, draws = bytearray((folder / SINGLE).read_bytes()), random.Random(seed(name))
    data[draws.randrange(8 + int.from_bytes(data[:8], "little"))] ^= 1 << draws.randrange(8)
    (folder / SINGLE).write_bytes(data)


def _length(folder, n):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(n.to_bytes(8, "little") + data[8:])


def _moved(name):
    return lambda folder: (folder / SINGLE).rename(folder / name)


FILES = {
    "sharded": _index,
    "both, index whole": partial(_index, keep_single=True),
    "both, index stale": _stale,
    "bin only": _pickled,
    "bin beside": partial(_pickled, keep=True),
    "shard gone": _shard_gone,
    "bin shards": partial(_pickled, name="pytorch_model-00001-of-00001.bin"),
    "original": _moved("consolidated.pth"),
    "index lacks one": _mapped(lambda places: dict(list(places.items())[1:])),
    "index has one more": _mapped(lambda places: places | {"more": "model-00001-of-00003.safetensors"}),
    "index points out": _mapped(lambda places: dict.fromkeys(places, "../../../etc/passwd")),
    "index points at a folder": _mapped(lambda places: dict.fromkeys(places, ".")),
    "index points wrong": _mapped(lambda places: dict.fromkeys(places, "model-00001-of-00003.safetensors")),
    "index of numbers": _mapped(lambda places: dict.fromkeys(places, 7)),
    "index of a list": _mapped(list),
    "index without map": partial(_index, change=lambda index: {"metadata": {}}),
    "index a list": partial(_index, change=lambda index: [1]),
    "index no JSON": partial(_index, change=lambda x: "{"),
    "index empty": partial(_index, change=lambda x: ""),
    "index null": partial(_index, change=lambda x: "null"),
    "pointer": _written(SINGLE, POINTER),
    "text": _written(SINGLE, "x" * 100),
    "folder": lambda folder: ((folder / SINGLE).unlink(), (folder / SINGLE).mkdir()),
    "index pointer": _written(INDEX, POINTER),
    "no weights": lambda folder: (folder / SINGLE).unlink(),
    "other name": _moved("weights.safetensors"),
    "one of one": _moved("model-00001-of-00001.safetensors"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "adapter": lambda folder: write_config(folder, {"peft_type": "LORA"}),
    "adapter beside": _written(
        "adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}'
    ),
    "dangling link": lambda folder: (
        (folder / SINGLE).unlink(),
        (folder / SINGLE).symlink_to(Path("nowhere")),
    ),
}
