"""Every model that can be served: what model/load.py opens, and the run directories of `nanoinfra train`.

A run's weights are the newest checkpoint that verifies, whatever mesh wrote it; they are read tensor by
tensor.
"""
import sys
from pathlib import Path

import torch

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import Source, filled
from nanoinfra.model.load import load
from nanoinfra.model.text import Text, read_json, read_text
from nanoinfra.train import checkpoint
from nanoinfra.train.manifest import read_manifest
from nanoinfra.train.pieces import Piece


def pretrained(name: str | Path, dtype: torch.dtype = torch.float32,
               attention: str = "sdpa") -> tuple[Decoder, Text | None, str | None]:
    """Model, tokenizer and chat template of a run directory or of what `load` opens. ValueError if none."""
    if "nanoinfra" in read_json(Path(name) / "config.json"):
        return *from_run(name, dtype, attention), None
    return load(name, dtype, attention)


def from_run(folder: str | Path, dtype: torch.dtype = torch.float32,
             attention: str = "sdpa") -> tuple[Decoder, Text | None]:
    """Model and tokenizer of a run directory. Raises ValueError where no checkpoint in it is whole."""
    folder = Path(folder)
    config = ModelConfig(**read_json(folder / "config.json")["model"])
    step = checkpoint.newest(folder / "checkpoints", say=lambda text: print(text, file=sys.stderr))
    if step is None:
        raise ValueError(f"no good checkpoint in {folder / 'checkpoints'}; train with --out {folder} first")
    manifest, shapes = read_manifest(step), checkpoint.catalog(step)

    def read(source):
        wanted = Piece.whole(source.name, shapes[source.name][0])
        return next(checkpoint.load(step, [wanted], manifest))[1]

    names = {name: Source(name) for name in shapes}
    return filled(config, attention, dtype, names, read), read_text(folder / "tokenizer")
