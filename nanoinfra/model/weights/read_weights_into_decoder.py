"""Fill a decoder with pretrained weights, tensor by tensor, so that memory never holds two copies of a model.

The decoder is built on the meta device (shapes without storage); then each parameter is read, cast and put in
its place, or a tensor-parallel rank reads its shard of each. Names are nanoinfra's: whoever opens a file
checks that every tensor is there in the right shape, and map_parameters_to_stored_tensors.py maps our names
to stored tensors.
"""
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.map_parameters_to_stored_tensors import (
    TensorSlices,
    TensorSource,
    read_parameter_slices,
    resolve_slices,
    shape_from_stored,
)

ReadParameter = Callable[..., torch.Tensor]
"""`read_parameter(name, slices=())`: our parameter `name`, or a part of it, on the CPU in the stored dtype.

GGUF is dequantized to float32. The tensor may be a view of a memory-mapped file: copy it to keep it."""


class PretrainedWeights(NamedTuple):
    """Opened pretrained weights: names and shapes are checked, tensors are not yet read."""
    config: ModelConfig
    read_parameter: ReadParameter
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    tokenizer_folder: Path | None = None     # None: the tokenizer comes from a GGUF file


def build_filled_decoder(config: ModelConfig, attention: str, dtype: torch.dtype,
                         read_parameter: ReadParameter) -> Decoder:
    """Build a decoder and fill each of its parameters with `read_parameter(name)`, cast to `dtype`."""
    model = decoder_on_meta_device(config, attention)
    for name in [name for name, _ in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        tensor = read_parameter(name).to(dtype, copy=True).contiguous()   # a copy: the file is only mapped
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    if config.tied:
        model.head.weight = model.embed.weight
    return model


def parameter_reader(config: ModelConfig, sources: dict[str, TensorSource],
                     stored_shape: Callable[[str], Sequence[int]],
                     read_stored: Callable[[str, TensorSlices], torch.Tensor]) -> ReadParameter:
    """A `ReadParameter` for stored tensors: `sources` says where each of our parameters lies.

    `stored_shape(stored_name)` is a tensor's shape, `read_stored(stored_name, slices)` reads a part of it.
    Raises ValueError, before anything is read, where a stored shape does not fit the configuration.
    """
    shapes, head_dim = parameter_shapes(config), config.head_dim
    for name, source in sources.items():
        if (got := shape_from_stored(source, stored_shape(source.stored_name))) != shapes[name]:
            raise ValueError(f"{source.stored_name} makes {name} of shape {got}, "
                             f"but the configuration says {shapes[name]}")

    def read_parameter(name, slices=()):
        slices = resolve_slices(name, shapes[name], slices)
        return read_parameter_slices(sources[name], shapes[name], head_dim, slices, read_stored)
    return read_parameter


def check_tensor_names(wanted: Iterable[str], present: Iterable[str], where: str) -> None:
    """Raise ValueError naming the tensors that `present` lacks, and those that are not `wanted`."""
    wanted, present = set(wanted), set(present)
    found = (("lacks", wanted - present), ("has, beside what the model needs,", present - wanted))
    problems = [f"{word} {_some(names)}" for word, names in found if names]
    if problems:
        raise ValueError(f"{where} {' and '.join(problems)}")


def decoder_on_meta_device(config: ModelConfig, attention: str = "sdpa") -> Decoder:
    """A decoder on the meta device: its parameters have shapes and no storage."""
    with torch.device("meta"):
        return Decoder(config, attention)


def _some(names: set[str], n: int = 5) -> str:
    shown = ", ".join(sorted(names)[:n])
    return shown if len(names) <= n else f"{shown} and {len(names) - n} more"
