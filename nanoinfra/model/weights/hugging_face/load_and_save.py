"""Read and write Hugging Face folders: config.json and safetensors, in one file or sharded with an index.

Weights are read tensor by tensor; every tensor that is missing, surplus or of a wrong shape is named, and no
parameter is left at random values. `transformers.AutoModelForCausalLM.from_pretrained` loads what is written.
Names are mapped in parameter_names.py, configurations in config.py.
"""
import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.config import model_config_to_hf, read_hf_config
from nanoinfra.model.weights.hugging_face.parameter_names import HF_HEAD_WEIGHT, HF_PARAMETER_NAMES
from nanoinfra.model.weights.hugging_face.tokenizer_files import (
    TOKENIZER_FILE_PATTERNS,
    copy_tokenizer_files,
    tokenizer_keys_for_config,
)
from nanoinfra.model.weights.map_parameters_to_stored_tensors import join_to_stored_tensor, parameter_sources
from nanoinfra.model.weights.read_weights_into_decoder import (
    PretrainedWeights,
    build_filled_decoder,
    check_tensor_names,
    parameter_reader,
)
from nanoinfra.model.weights.replace_files import replace_model_files
from nanoinfra.model.weights.safetensors_files import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX_FILE,
    SafetensorsFolder,
)


def load_hf_model(folder: str | Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Decoder:
    """Load the model in a Hugging Face folder.

    Raises ValueError naming what is unknown or missing, what is there beside it, and wrong shapes.
    """
    weights = open_hf_weights(folder)
    return build_filled_decoder(weights.config, attention, dtype, weights.read_parameter)


def open_hf_weights(folder: str | Path) -> PretrainedWeights:
    """Open the weights in a Hugging Face folder, to be read whole or in parts.

    Raises ValueError as `load_hf_model` does. Where a tied head is stored beside its embedding, each part of
    the embedding that is read is compared with it.
    """
    folder = Path(folder)
    config = read_hf_config(folder)
    names = HF_PARAMETER_NAMES[config.family]
    tensors = SafetensorsFolder(folder, names.name_prefix)
    found = parameter_sources(config, names.tensor_sources)
    wanted = {source.stored_name for source in found.values()}
    has_tied_head = config.tied and HF_HEAD_WEIGHT in tensors.names
    present = {name for name in tensors.names if not re.fullmatch(names.buffer_pattern, name)}
    check_tensor_names(wanted, present - {HF_HEAD_WEIGHT} if has_tied_head else present, str(folder))
    try:
        read_parameter = parameter_reader(config, found, tensors.tensor_shape, tensors.read_slices)
        weights = PretrainedWeights(config, read_parameter)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return _checked(weights, tensors, folder) if has_tied_head else weights


def save_hf_model(model: Decoder, folder: str | Path, tokenizer_folder: str | Path | None = None,
                  shard_bytes: int = 4 * 2**30) -> None:
    """Write `model` as a Hugging Face folder in the dtype of its weights, as `write_hf_folder` does."""
    shapes = parameter_shapes(model.config)

    def read_parameter(name):
        parameter = model.get_parameter(name).detach()
        if tuple(parameter.shape) != shapes[name]:
            raise ValueError(f"{name} has the shape {list(parameter.shape)}, but {list(shapes[name])} in a "
                             "model that is whole: export the checkpoint of its run instead")
        return parameter
    dtype = model.embed.weight.dtype
    write_hf_folder(model.config, read_parameter, dtype, folder, tokenizer_folder, shard_bytes)


def write_hf_folder(config: ModelConfig, read_parameter: Callable[[str], torch.Tensor], dtype: torch.dtype,
                    folder: str | Path, tokenizer_folder: str | Path | None = None,
                    shard_bytes: int = 4 * 2**30) -> None:
    """Write a Hugging Face folder with the parameters `read_parameter(name)`, cast to `dtype`.

    `tokenizer_folder` is a folder whose tokenizer files are copied. Weights of more than `shard_bytes` go
    into several files with an index; each file is written before the parameters of the next are read.
    """
    content = model_config_to_hf(config) | _other_config_entries(dtype, tokenizer_folder)
    with replace_model_files(Path(folder), TOKENIZER_FILE_PATTERNS) as new:
        _write_weights(config, read_parameter, dtype, new, shard_bytes)
        if tokenizer_folder is not None:
            copy_tokenizer_files(tokenizer_folder, new)
        (new / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(config, read_parameter, dtype, folder, shard_bytes):
    shards = _shards(config, dtype, shard_bytes)
    numbered = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = [SAFETENSORS_FILE] if len(shards) == 1 else numbered
    for file, shard in zip(names, shards, strict=True):
        save_file({theirs: _join(config, read_parameter, dtype, parts) for theirs, parts in shard.items()},
                  folder / file, {"format": "pt"})                 # no variable: freed before the next shard
    if len(shards) > 1:
        places = {theirs: file for file, shard in zip(names, shards, strict=True) for theirs in shard}
        index = json.dumps({"metadata": {}, "weight_map": places}, indent=2)
        (folder / SAFETENSORS_INDEX_FILE).write_text(index, encoding="utf-8")


def _checked(weights, tensors, folder):
    """`weights` whose reader raises ValueError where the stored head differs from its tied embedding."""
    def read_parameter(name, slices=()):
        x = weights.read_parameter(name, slices)
        if name == "embed.weight":
            alike = tensors.tensor_shape(HF_HEAD_WEIGHT) == parameter_shapes(weights.config)[name]
            head = tensors.read_slices(HF_HEAD_WEIGHT, slices or ...).to(x.dtype) if alike else None
            if not alike or not torch.equal(head, x):
                raise ValueError(f"{folder}: config.json ties the head to the embedding, but "
                                 f"{HF_HEAD_WEIGHT} differs; set tie_word_embeddings to false there to use "
                                 "both")
        return x
    return weights._replace(read_parameter=read_parameter)


def _shards(config, dtype, shard_bytes):
    """Stored names with the parameters that each fuses, in shards of at most `shard_bytes` (or one name)."""
    names, shape_of = HF_PARAMETER_NAMES[config.family], parameter_shapes(config)
    parts = {}
    for ours, source in parameter_sources(config, names.tensor_sources).items():
        prefix = "" if source.stored_name == HF_HEAD_WEIGHT else names.name_prefix
        parts.setdefault(prefix + source.stored_name, []).append((ours, source))
    shards, room = [{}], shard_bytes
    for theirs, made_of in parts.items():
        rows_before = made_of[0][1].rows_before                    # rows that no parameter has
        count = sum(prod(shape_of[ours]) for ours, _ in made_of) + rows_before * config.width
        size = count * dtype.itemsize
        if size > room and shards[-1]:
            shards, room = [*shards, {}], shard_bytes
        shards[-1][theirs] = made_of
        room -= size
    return shards


def _join(config, read_parameter, dtype, parts):
    """The stored tensor from our parameters; `parts` are pairs (our name, its source)."""
    parameters = [read_parameter(ours).to("cpu", dtype) for ours, _ in parts]
    return join_to_stored_tensor(parts[0][1], config.head_dim, parameters)


def _other_config_entries(dtype, tokenizer_folder):
    """The entries of config.json besides the model's: the dtype, and the tokenizer's special token ids."""
    name = str(dtype).removeprefix("torch.")
    return tokenizer_keys_for_config(tokenizer_folder) | {"dtype": name, "torch_dtype": name}
