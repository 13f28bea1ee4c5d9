"""The tensors of a Hugging Face folder by name: safetensors, in one file or in several under an index.

Files are mapped, not read: a slice touches the pages that hold it. Used by hf.py.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoinfra.model.source import Box
from nanoinfra.model.text import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Tensors:
    """The tensors of `folder`, the base's `prefix` dropped from their names.

    Raises ValueError for what is missing, cannot be read, or is there twice.
    """

    def __init__(self, folder: Path, prefix: str):
        self.slices = {}                     # name without prefix -> safetensors' slice of the whole
        for file in _files(folder):
            try:
                handle = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
            for name in handle.keys():
                key = name.removeprefix(prefix)
                if key in self.slices:
                    raise ValueError(f"{file} holds {name}, which an earlier file of the folder holds too")
                self.slices[key] = handle.get_slice(name)
        self.names = set(self.slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header."""
        return tuple(self.slices[name].get_shape())

    def fetch(self, name: str, box: Box) -> torch.Tensor:
        """The part `box` of a tensor: a view of the mapped file."""
        return self.slices[name][box]


def _files(folder):
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX} lists {name}, which is not in the folder")
        return [folder / name for name in names]
    if not (folder / SINGLE).is_file():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; .bin files are pickles and not read "
                         "here: load them with transformers and save_pretrained")
    return [folder / SINGLE]
