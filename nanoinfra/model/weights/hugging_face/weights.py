"""Hugging Face folders in and out: config.json and safetensors, in one file or sharded under an index.

In, tensor by tensor, with every missing, surplus or misshapen one named and nothing left at random values;
out, a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads unchanged. Names are
hf_names.py's, configurations hf_config.py's.
"""
import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.fill_model import Weights, check_names, filled, reader
from nanoinfra.model.weights.hugging_face.config import config_to, read_config
from nanoinfra.model.weights.hugging_face.parameter_names import HEAD, NAMES
from nanoinfra.model.weights.hugging_face.tokenizer_files import TEXT_FILES, copy_text, kept_ids
from nanoinfra.model.weights.replace_files import replaced
from nanoinfra.model.weights.safetensors_files import INDEX, SINGLE, Tensors
from nanoinfra.model.weights.tensor_sources import joined, sources


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Decoder:
    """The model in a Hugging Face folder. ValueError names what is unknown, missing, surplus or misshapen."""
    weights = open_hf(folder)
    return filled(weights.config, attention, dtype, weights.read)


def open_hf(folder: str | Path) -> Weights:
    """The weights in a Hugging Face folder, to be read whole or in parts; raises as `load_hf` does.

    A head stored beside the embedding it is tied to is compared where, and as far as, the embedding is read.
    """
    folder = Path(folder)
    config = read_config(folder)
    names = NAMES[config.family]
    tensors = Tensors(folder, names.prefix)
    found = sources(config, names.tensors)
    wanted = {source.name for source in found.values()}
    spare = config.tied and HEAD in tensors.names
    check_names(wanted, {name for name in tensors.names if not re.fullmatch(names.buffers, name)
                         and not (spare and name == HEAD)}, str(folder))
    try:
        weights = Weights(config, reader(config, found, tensors.shape, tensors.fetch))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return _checked(weights, tensors, folder) if spare else weights


def save_hf(model: Decoder, folder: str | Path, tokenizer: str | Path | None = None,
            shard_bytes: int = 4 * 2**30) -> None:
    """Write `model` as a Hugging Face folder; as `write_hf`, in the dtype of its weights."""
    whole = shapes(model.config)

    def read(name):
        parameter = model.get_parameter(name).detach()
        if tuple(parameter.shape) != whole[name]:
            raise ValueError(f"{name} has the shape {list(parameter.shape)}, but {list(whole[name])} in a "
                             "model that is whole: export the checkpoint of its run instead")
        return parameter
    write_hf(model.config, read, model.embed.weight.dtype, folder, tokenizer, shard_bytes)


def write_hf(config: ModelConfig, read: Callable[[str], torch.Tensor], dtype: torch.dtype,
             folder: str | Path, tokenizer: str | Path | None = None, shard_bytes: int = 4 * 2**30) -> None:
    """Write a Hugging Face folder of the parameters `read(name)`, as `dtype`, with the `tokenizer`'s files.

    Past `shard_bytes` they go into several files and an index, each file written before the next is read.
    """
    folder, theirs = Path(folder), config_to(config) | _own(dtype, tokenizer)
    with replaced(folder, TEXT_FILES) as new:
        _write_weights(config, read, dtype, new, shard_bytes)
        if tokenizer is not None:
            copy_text(tokenizer, new)
        (new / "config.json").write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")


def _write_weights(config, read, dtype, folder, shard_bytes):
    shards = _shards(config, dtype, shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05}-of-{len(shards):05}.safetensors"
                                              for i in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        save_file({theirs: _join(config, read, dtype, parts) for theirs, parts in shard.items()},
                  folder / file, {"format": "pt"})                 # no name: freed before the next is read
    if len(shards) > 1:
        places = {theirs: file for file, shard in zip(names, shards, strict=True) for theirs in shard}
        index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
        (folder / INDEX).write_text(index, encoding="utf-8")


def _checked(weights, tensors, folder):
    """`weights`, which refuse an embedding that the stored head is tied to and is not."""
    def read(name, box=()):
        x = weights.read(name, box)
        if name == "embed.weight":
            alike = tensors.shape(HEAD) == shapes(weights.config)[name]
            if not alike or not torch.equal(tensors.fetch(HEAD, box or ...).to(x.dtype), x):
                raise ValueError(f"{folder}: config.json ties the head to the embedding, but {HEAD} differs; "
                                 "set tie_word_embeddings to false there to use both")
        return x
    return weights._replace(read=read)


def _shards(config, dtype, shard_bytes):
    """Their names with the parameters each is made of, in groups of `shard_bytes` at most (or one name)."""
    names, shape_of = NAMES[config.family], shapes(config)
    parts = {}
    for ours, source in sources(config, names.tensors).items():
        prefix = "" if source.name == HEAD else names.prefix
        parts.setdefault(prefix + source.name, []).append((ours, source))
    shards, room = [{}], shard_bytes
    for theirs, made_of in parts.items():
        rows_before = made_of[0][1].before                         # of none of ours
        count = sum(prod(shape_of[ours]) for ours, _ in made_of) + rows_before * config.width
        size = count * dtype.itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][theirs] = made_of
        room -= size
    return shards


def _join(config, read, dtype, parts):
    """Their tensor from ours, `parts` of (our name, where it lies)."""
    return joined(parts[0][1], config.head_dim, [read(ours).to("cpu", dtype) for ours, _ in parts])


def _own(dtype, tokenizer):
    """What config.json says beside the shape: the dtype, and the tokenizer's first and last token."""
    name = str(dtype).removeprefix("torch.")
    return kept_ids(tokenizer) | {"dtype": name, "torch_dtype": name}
