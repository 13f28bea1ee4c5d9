"""Load any model that can be served, run directories included, and export a run to Hugging Face's format.

A run's weights are the newest checkpoint that verifies, whatever mesh wrote it; they are read tensor by
tensor.
"""
import sys
from math import prod
from pathlib import Path

import torch

from nanoinfra.distributed.mesh import MeshAxis, single_rank_axis
from nanoinfra.formulas.parameters import TensorShard, block_parameter_shapes, parameter_shapes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.hugging_face.load_and_save import write_hf_folder
from nanoinfra.model.weights.hugging_face.tokenizer_files import (
    copy_tokenizer_files,
    open_hf_tokenizer,
    write_tokenizer_files,
)
from nanoinfra.model.weights.load_model import open_model_weights
from nanoinfra.model.weights.map_parameters_to_stored_tensors import resolve_slices
from nanoinfra.model.weights.read_json_files import read_json
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights, build_filled_decoder
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.checkpoint.safetensors_and_manifest import read_manifest
from nanoinfra.train.run_directory.check_out_folder import read_model_config


def load_pretrained(name_or_path: str | Path, dtype: torch.dtype = torch.float32,
                    attention: str = "sdpa") -> tuple[Decoder, Tokenizer | None, str | None]:
    """Load model, tokenizer and chat template of a run directory, a model folder or file, or a known name.

    Raises ValueError when `name_or_path` is none of them.
    """
    weights = open_pretrained_weights(name_or_path)
    model = build_filled_decoder(weights.config, attention, dtype, weights.read_parameter)
    return model, weights.tokenizer, weights.chat_template


def open_pretrained_weights(name_or_path: str | Path, axis: MeshAxis | None = None) -> PretrainedWeights:
    """Open the weights of a run directory or of what `open_model_weights` opens, to be read in slices.

    Every rank of `axis` calls it; its first rank verifies the checkpoint of a run directory.
    """
    is_run = "nanoinfra" in read_json(Path(name_or_path) / "config.json")
    return open_run_weights(name_or_path, axis) if is_run else open_model_weights(name_or_path)


def open_run_weights(folder: str | Path, axis: MeshAxis | None = None) -> PretrainedWeights:
    """Open the newest weights of a run directory. Raises ValueError when it has no good checkpoint."""
    folder = Path(folder)
    return PretrainedWeights(*_newest(folder, axis), *open_hf_tokenizer(folder / "tokenizer"),
                             folder / "tokenizer")


def export_to_hugging_face(run: str | Path, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the newest checkpoint of a run directory as a Hugging Face folder, with its tokenizer.

    Whatever mesh and ZeRO stage wrote it, no more is held at a time than a block, or the embedding.
    """
    config, read = _newest(Path(run))
    block = sum(prod(shape) for shape in block_parameter_shapes(config).values()) * dtype.itemsize
    write_hf_folder(config, read, dtype, folder, Path(run) / "tokenizer", shard_bytes=block)


def save_pretrained_tokenizer(weights: PretrainedWeights, folder: str | Path) -> None:
    """Write the tokenizer and chat template of `weights` into `folder`, for a run that starts from them."""
    if weights.tokenizer_folder is not None:
        copy_tokenizer_files(weights.tokenizer_folder, folder, include_config=True)
    elif weights.tokenizer is not None:
        write_tokenizer_files(weights.tokenizer, weights.chat_template, folder)


def _newest(folder, axis=None):
    """The model configuration, and a function that reads parameters from the newest good checkpoint."""
    config = read_model_config(folder)
    step = save_and_load.find_newest_checkpoint_on_all_ranks(folder / "checkpoints",
                                                             axis or single_rank_axis("world"),
                                                             warn=lambda text: print(text, file=sys.stderr))
    if step is None:
        raise ValueError(f"no good checkpoint in {folder / 'checkpoints'}; train with --out {folder} first")
    manifest, every = read_manifest(step), parameter_shapes(config)

    def read(name, slices=()):
        shard = TensorShard.of_whole_tensor(name, every[name])
        for dim, part in enumerate(resolve_slices(name, every[name], slices)):
            shard = shard.slice_dim(dim, part.start, part.stop)
        return next(save_and_load.load_shards(step, [shard], manifest))[1]
    return config, read
