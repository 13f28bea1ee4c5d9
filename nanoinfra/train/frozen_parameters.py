"""Frozen parameters: training does not change them; names are chosen by `--freeze embed.* blocks.0.*`.

A frozen parameter has no gradient, no master weights and no moments, and of it only weights are sent; a
checkpoint holds it all the same, so that the run can be served. Patterns are the shell's (fnmatch), over the
names that formulas/parameters.py lists. Composes with every axis, ZeRO and recompute.
"""
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from math import prod
from types import SimpleNamespace

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.pipeline import chunk_parameter_names


def frozen_parameter_names(patterns: Iterable[str], config: ModelConfig,
                           num_chunks: int = 1) -> frozenset[str]:
    """Return the names of the parameters that `patterns` freeze, in a model of `num_chunks` pipeline chunks.

    Raises ValueError for a pattern that matches no name, and when a chunk has nothing left to train.
    """
    found = set()
    for pattern in patterns:
        names = {name for name in parameter_shapes(config) if fnmatchcase(name, pattern)}
        if not names:
            some = ", ".join(dict.fromkeys(_abbreviated(name) for name in parameter_shapes(config)))
            raise ValueError(f"--freeze {pattern!r} is no parameter's name; they are {some}")
        found |= names
    for i, names in enumerate(chunk_parameter_names(config, num_chunks, config.context) if found else ()):
        if found.issuperset(names):
            where = f"chunk {i} of the pipeline's {num_chunks}" if num_chunks > 1 else "this model"
            raise ValueError(f"--freeze leaves nothing to train in {where} ({len(names)} parameters, all "
                             "frozen); freeze fewer" + ", or use --pp 1" * (num_chunks > 1))
    return frozenset(found)


def trainable_parameter_count(patterns: Iterable[str], config: ModelConfig) -> int:
    """Count the numbers in the parameters that `patterns` leave trainable."""
    frozen = frozen_parameter_names(patterns, config)
    return sum(prod(shape) for name, shape in parameter_shapes(config).items() if name not in frozen)


def refusals(flags: SimpleNamespace) -> Iterator[str]:
    """Yield why --freeze does not fit the model of `flags`, the flags of `nanoinfra train` by name."""
    if flags.model_config:
        try:
            frozen_parameter_names(flags.freeze, flags.model_config)
        except ValueError as error:
            yield str(error)


def _abbreviated(name):
    """blocks.3.attn.q.weight as blocks.N.attn.q.weight."""
    first, *rest = name.split(".")
    return ".".join([first, "N", *rest[1:]]) if first == "blocks" else name
