"""Fill a decoder tensor by tensor: no more than one copy of the model, plus one tensor, is ever in memory.

The decoder is built on the meta device (shapes without storage); each parameter is then read, checked, cast
and put in place. Names are ours here; hf.py and gguf.py know what others call them.
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder


class Source(NamedTuple):
    """Where one of our tensors lies in a foreign file."""
    name: str                        # the tensor's name there
    transposed: bool = False         # stored (in, out): GPT-2's Conv1D
    third: int | None = None         # 0, 1, 2: our part of a fused q, k, v


def filled(config: ModelConfig, attention: str, dtype: torch.dtype, found: dict[str, Source],
           read: Callable[[Source], torch.Tensor]) -> Decoder:
    """A decoder whose parameter `name` is `read(found[name])` as `dtype`. ValueError for a wrong shape."""
    model = empty(config, attention)
    for name, parameter in list(model.named_parameters()):
        tensor = read(found[name])
        if tensor.shape != parameter.shape:
            raise ValueError(f"{found[name].name} makes {name} of shape {tuple(tensor.shape)}, "
                             f"but the configuration says {tuple(parameter.shape)}")
        owner, _, leaf = name.rpartition(".")
        tensor = tensor.to(dtype, copy=True).contiguous()                 # a copy: files are mapped, not read
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
    if config.tied:
        model.head.weight = model.embed.weight
    return model


def sources(config: ModelConfig, table: dict[str, Source]) -> dict[str, Source]:
    """Where each parameter of such a decoder lies: a family's table with its layers written out."""
    found = {}
    for name, _ in empty(config).named_parameters():
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        source = table[name.replace(f"blocks.{layer}.", "blocks.{i}.", 1) if layer else name]
        found[name] = source._replace(name=source.name.replace("{i}", layer))
    return found


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
