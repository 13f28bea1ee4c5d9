"""Fill a decoder tensor by tensor: no more than one copy of the model, plus one tensor, is ever in memory.

The decoder is built on the meta device (shapes without storage); each parameter is then read, cast and put in
place. Names are ours here; who opens a file has checked that all are there in the shapes they must have, so
that a rank can read its part of each and no more (source.py knows how parts lie).
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
"""`read(name, box=())`: our parameter `name`, or its part `box`, on the CPU in the stored dtype.

GGUF is dequantised to float32. What comes may be a view of a mapped file: copy what is to be kept."""


class Weights(NamedTuple):
    """Pretrained weights, opened: names and shapes are checked, tensors not yet read."""
    config: ModelConfig
    read: Read
    text: Text | None = None         # tokenizer
    template: str | None = None      # chat template
    files: Path | None = None        # the folder whose files say all that (hf_text.py); None: of a GGUF file


def filled(config: ModelConfig, attention: str, dtype: torch.dtype, read: Read) -> Decoder:
    """A decoder whose parameter `name` is `read(name)` as `dtype`."""
    model = empty(config, attention)
    for name in [name for name, _ in model.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        tensor = read(name).to(dtype, copy=True).contiguous()             # a copy: files are mapped, not read
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    if config.tied:
        model.head.weight = model.embed.weight
    return model


def reader(config: ModelConfig, found: dict[str, Source], stored: Callable[[str], Sequence[int]],
           fetch: Callable[[str, Box], torch.Tensor]) -> Read:
    """Read parameters from where `found` says, by `fetch(their name, box)`; `stored(their name)` is a shape.

    Raises ValueError, before anything is read, for a stored tensor that is not of the configuration's shape.
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
    """Raise ValueError naming what is missing in `there` and what is there beside `wanted`."""
    wanted, there = set(wanted), set(there)
    problems = [f"{word} {_some(names)}" for word, names in
                (("lacks", wanted - there), ("has, beside what the model needs,", there - wanted)) if names]
    if problems:
        raise ValueError(f"{where} {' and '.join(problems)}")


def empty(config: ModelConfig, attention: str = "sdpa") -> Decoder:
    """A decoder of shapes without storage."""
    with torch.device("meta"):
        return Decoder(config, attention)


def _some(names: set[str], n: int = 5) -> str:
    shown = ", ".join(sorted(names)[:n])
    return shown if len(names) <= n else f"{shown} and {len(names) - n} more"
