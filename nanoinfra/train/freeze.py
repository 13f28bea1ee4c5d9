"""Parameters that training leaves as they are, chosen by name: `--freeze embed.* blocks.0.*`.

What is frozen has no gradient, no master and no moments, and sends nothing but its weights; a checkpoint
holds it all the same, so that the run can be served. Patterns are the shell's (fnmatch), over the names that
`parameter_shapes` lists. Composes with every axis, ZeRO and recompute.
"""
from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.pipeline import chunk_parameter_names


def frozen_names(patterns: Iterable[str], config: ModelConfig, chunks: int = 1) -> frozenset[str]:
    """The names of the parameters that `patterns` freeze, in a model that a pipeline cuts into `chunks`.

    Raises ValueError for a pattern that no name matches, and where a chunk has nothing left to train.
    """
    found = set()
    for pattern in patterns:
        names = {name for name in parameter_shapes(config) if fnmatchcase(name, pattern)}
        if not names:
            some = ", ".join(dict.fromkeys(_abbreviated(name) for name in parameter_shapes(config)))
            raise ValueError(f"--freeze {pattern!r} is no parameter's name; they are {some}")
        found |= names
    for i, names in enumerate(chunk_parameter_names(config, chunks, config.context) if found else ()):
        if found.issuperset(names):
            where = f"chunk {i} of the pipeline's {chunks}" if chunks > 1 else "this model"
            raise ValueError(f"--freeze leaves nothing to train in {where} ({len(names)} parameters, all "
                             "frozen); freeze fewer" + ", or use --pp 1" * (chunks > 1))
    return frozenset(found)


def trained_parameters(patterns: Iterable[str], config: ModelConfig) -> int:
    """How many numbers of the model `patterns` leave to be trained."""
    frozen = frozen_names(patterns, config)
    return sum(prod(shape) for name, shape in parameter_shapes(config).items() if name not in frozen)


def _abbreviated(name):
    """blocks.3.attn.q.weight as blocks.N.attn.q.weight."""
    first, *rest = name.split(".")
    return ".".join([first, "N", *rest[1:]]) if first == "blocks" else name
