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
from nanoinfra.formulas.parameters import block_parameter_shapes, parameter_shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.fill_model import PretrainedWeights, build_filled_decoder
from nanoinfra.model.weights.hugging_face.tokenizer_files import (
    copy_tokenizer_files,
    open_hf_tokenizer,
    write_tokenizer_files,
)
from nanoinfra.model.weights.hugging_face.weights import write_hf_folder
from nanoinfra.model.weights.json_files import read_json
from nanoinfra.model.weights.load import open_model_weights
from nanoinfra.model.weights.tensor_sources import resolve_slices
from nanoinfra.train.checkpoint import checkpoint
from nanoinfra.train.checkpoint.manifest import read_manifest
from nanoinfra.train.checkpoint.tensor_shards import Piece
from nanoinfra.train.run_directory.ownership import model_of


def pretrained(name: str | Path, dtype: torch.dtype = torch.float32,
               attention: str = "sdpa") -> tuple[Decoder, Tokenizer | None, str | None]:
    """Model, tokenizer and chat template of a run directory or of what `load` opens. ValueError if none."""
    weights = open_pretrained(name)
    model = build_filled_decoder(weights.config, attention, dtype, weights.read_parameter)
    return model, weights.tokenizer, weights.chat_template


def from_run(folder: str | Path, dtype: torch.dtype = torch.float32,
             attention: str = "sdpa") -> tuple[Decoder, Tokenizer | None]:
    """Model and tokenizer of a run directory. Raises ValueError where no checkpoint in it is whole."""
    weights = open_run(folder)
    return build_filled_decoder(weights.config, attention, dtype, weights.read_parameter), weights.tokenizer


def open_pretrained(name: str | Path, axis: Axis | None = None) -> PretrainedWeights:
    """The weights of a run directory or of what `load` opens, to be read whole or in parts.

    Every rank of `axis` calls it; of a run directory the first one verifies the checkpoint.
    """
    run = "nanoinfra" in read_json(Path(name) / "config.json")
    return open_run(name, axis) if run else open_model_weights(name)


def open_run(folder: str | Path, axis: Axis | None = None) -> PretrainedWeights:
    """The newest weights of a run directory. Raises ValueError where no checkpoint in it is whole."""
    folder = Path(folder)
    return PretrainedWeights(*_newest(folder, axis), *open_hf_tokenizer(folder / "tokenizer"),
                             folder / "tokenizer")


def export(run: str | Path, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the newest checkpoint of a run directory as a Hugging Face folder, with its tokenizer.

    Whatever mesh and ZeRO stage wrote it, no more is held at a time than a block, or the embedding.
    """
    config, read = _newest(Path(run))
    block = sum(prod(shape) for shape in block_parameter_shapes(config).values()) * dtype.itemsize
    write_hf_folder(config, read, dtype, folder, Path(run) / "tokenizer", shard_bytes=block)


def keep_text(weights: PretrainedWeights, folder: str | Path) -> None:
    """Leave tokenizer and chat template of `weights` in `folder`, for a run that starts from them."""
    if weights.tokenizer_folder is not None:
        copy_tokenizer_files(weights.tokenizer_folder, folder, include_config=True)
    elif weights.tokenizer is not None:
        write_tokenizer_files(weights.tokenizer, weights.chat_template, folder)


def _newest(folder, axis=None):
    """Configuration, and how to read parameters from the newest checkpoint that verifies."""
    config = model_of(folder)
    step = checkpoint.newest_of_all(folder / "checkpoints", axis or alone("world"),
                                    say=lambda text: print(text, file=sys.stderr))
    if step is None:
        raise ValueError(f"no good checkpoint in {folder / 'checkpoints'}; train with --out {folder} first")
    manifest, every = read_manifest(step), parameter_shapes(config)

    def read(name, box=()):
        piece = Piece.whole(name, every[name])
        for dim, part in enumerate(resolve_slices(name, every[name], box)):
            piece = piece.cut(dim, part.start, part.stop)
        return next(checkpoint.load(step, [piece], manifest))[1]
    return config, read
