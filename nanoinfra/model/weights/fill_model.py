"""Fill a decoder with pretrained weights, tensor by tensor, so that memory never holds two copies of a model.

The decoder is built on the meta device (shapes without storage); then each parameter is read, cast and put in
its place, or a tensor-parallel rank reads its shard of each. Names are nanoinfra's: whoever opens a file
checks that every tensor is there in the right shape, and tensor_sources.py maps our names to stored tensors.
"""
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.tensor_sources import Box, Source, bounds, made_shape, read_box

Read = Callable[..., torch.Tensor]
"""`read_parameter(name, slices=())`: our parameter `name`, or a part of it, on the CPU in the stored dtype.

GGUF is dequantized to float32. The tensor may be a view of a memory-mapped file: copy it to keep it."""


class Weights(NamedTuple):
    """Opened pretrained weights: names and shapes are checked, tensors are not yet read."""
    config: ModelConfig
    read: Read
    text: Text | None = None
    template: str | None = None
    files: Path | None = None        # the folder with the tokenizer's files; None: it comes from a GGUF file


def filled(config: ModelConfig, attention: str, dtype: torch.dtype, read: Read) -> Decoder:
    """Build a decoder and fill each of its parameters with `read_parameter(name)`, cast to `dtype`."""
    model = empty(config, attention)
    for name in [name for name, _ in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        tensor = read(name).to(dtype, copy=True).contiguous()             # a copy: the file is only mapped
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    if config.tied:
        model.head.weight = model.embed.weight
    return model


def reader(config: ModelConfig, found: dict[str, Source], stored: Callable[[str], Sequence[int]],
           fetch: Callable[[str, Box], torch.Tensor]) -> Read:
    """A `ReadParameter` for stored tensors: `sources` says where each of our parameters lies.

    `stored_shape(stored_name)` is a tensor's shape, `read_stored(stored_name, slices)` reads a part of it.
    Raises ValueError, before anything is read, where a stored shape does not fit the configuration.
    """
    every = shapes(config)
    for name, source in found.items():
        if (got := made_shape(source, stored(source.name))) != every[name]:
            raise ValueError(f"{source.name} makes {name} of shape {got}, "
                             f"but the configuration says {every[name]}")

    def read(name, box=()):
        return read_box(found[name], every[name], config.head_dim, bounds(name, every[name], box), fetch)
    return read


def check_names(wanted: Iterable[str], there: Iterable[str], where: str) -> None:
    """Raise ValueError naming the tensors that `present` lacks, and those that are not `wanted`."""
    wanted, there = set(wanted), set(there)
    problems = [f"{word} {_some(names)}" for word, names in
                (("lacks", wanted - there), ("has, beside what the model needs,", there - wanted)) if names]
    if problems:
        raise ValueError(f"{where} {' and '.join(problems)}")


def empty(config: ModelConfig, attention: str = "sdpa") -> Decoder:
    """A decoder on the meta device: its parameters have shapes and no storage."""
    with torch.device("meta"):
        return Decoder(config, attention)


def _some(names: set[str], n: int = 5) -> str:
    shown = ", ".join(sorted(names)[:n])
    return shown if len(names) <= n else f"{shown} and {len(names) - n} more"
