"""Every model that can be served: what model/weights/load.py opens,
and the run directories of `nanoinfra train`.

A run's weights are the newest checkpoint that verifies, whatever mesh wrote it; they are read tensor by
tensor.
"""
import sys
from math import prod
from pathlib import Path

import torch

from nanoinfra.distributed.mesh import Axis, alone
from nanoinfra.formulas.parameters import block_shapes, shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.fill_model import Weights, filled
from nanoinfra.model.weights.hugging_face.tokenizer_files import copy_text, open_text, write_text
from nanoinfra.model.weights.hugging_face.weights import write_hf
from nanoinfra.model.weights.json_files import read_json
from nanoinfra.model.weights.load import open_weights
from nanoinfra.model.weights.tensor_sources import bounds
from nanoinfra.train.checkpoint import checkpoint
from nanoinfra.train.checkpoint.manifest import read_manifest
from nanoinfra.train.checkpoint.tensor_shards import Piece
from nanoinfra.train.run_directory.ownership import model_of


def pretrained(name: str | Path, dtype: torch.dtype = torch.float32,
               attention: str = "sdpa") -> tuple[Decoder, Text | None, str | None]:
    """Model, tokenizer and chat template of a run directory or of what `load` opens. ValueError if none."""
    weights = open_pretrained(name)
    return filled(weights.config, attention, dtype, weights.read), weights.text, weights.template


def from_run(folder: str | Path, dtype: torch.dtype = torch.float32,
             attention: str = "sdpa") -> tuple[Decoder, Text | None]:
    """Model and tokenizer of a run directory. Raises ValueError where no checkpoint in it is whole."""
    weights = open_run(folder)
    return filled(weights.config, attention, dtype, weights.read), weights.text


def open_pretrained(name: str | Path, axis: Axis | None = None) -> Weights:
    """The weights of a run directory or of what `load` opens, to be read whole or in parts.

    Every rank of `axis` calls it; of a run directory the first one verifies the checkpoint.
    """
    run = "nanoinfra" in read_json(Path(name) / "config.json")
    return open_run(name, axis) if run else open_weights(name)


def open_run(folder: str | Path, axis: Axis | None = None) -> Weights:
    """The newest weights of a run directory. Raises ValueError where no checkpoint in it is whole."""
    folder = Path(folder)
    return Weights(*_newest(folder, axis), *open_text(folder / "tokenizer"), folder / "tokenizer")


def export(run: str | Path, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the newest checkpoint of a run directory as a Hugging Face folder, with its tokenizer.

    Whatever mesh and ZeRO stage wrote it, no more is held at a time than a block, or the embedding.
    """
    config, read = _newest(Path(run))
    block = sum(prod(shape) for shape in block_shapes(config).values()) * dtype.itemsize
    write_hf(config, read, dtype, folder, Path(run) / "tokenizer", shard_bytes=block)


def keep_text(weights: Weights, folder: str | Path) -> None:
    """Leave tokenizer and chat template of `weights` in `folder`, for a run that starts from them."""
    if weights.files is not None:
        copy_text(weights.files, folder, config=True)
    elif weights.text is not None:
        write_text(weights.text, weights.template, folder)


def _newest(folder, axis=None):
    """Configuration, and how to read parameters from the newest checkpoint that verifies."""
    config = model_of(folder)
    step = checkpoint.newest_of_all(folder / "checkpoints", axis or alone("world"),
                                    say=lambda text: print(text, file=sys.stderr))
    if step is None:
        raise ValueError(f"no good checkpoint in {folder / 'checkpoints'}; train with --out {folder} first")
    manifest, every = read_manifest(step), shapes(config)

    def read(name, box=()):
        piece = Piece.whole(name, every[name])
        for dim, part in enumerate(bounds(name, every[name], box)):
            piece = piece.cut(dim, part.start, part.stop)
        return next(checkpoint.load(step, [piece], manifest))[1]
    return config, read
