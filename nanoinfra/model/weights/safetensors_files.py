"""The tensors of a Hugging Face folder by name: safetensors, in one file or in several under an index.

Files are mapped, not read: a slice touches the pages that hold it. Used by hf.py.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoinfra.model.weights.json_files import check_content, read_json
from nanoinfra.model.weights.tensor_sources import Box

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")       # safetensors' names for what a weight may be stored as


class Tensors:
    """The tensors of `folder`, the base's `prefix` dropped from their names.

    Raises ValueError for what is missing, cannot be read, or is there twice.
    """

    def __init__(self, folder: Path, prefix: str):
        self.slices = {}                     # name without prefix -> safetensors' slice of the whole
        self.folder = folder
        for file in _files(folder):
            handle = _opened(file)
            for name in handle.keys():
                key = name.removeprefix(prefix)
                if key in self.slices:
                    raise ValueError(f"{file} holds {name}, which an earlier file of the folder holds too")
                self.slices[key] = handle.get_slice(name)
        self.names = set(self.slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, from the file's header. ValueError for a tensor that is not of floats."""
        if (dtype := self.slices[name].get_dtype()) not in FLOATS:
            raise ValueError(f"{name} is stored as {dtype}, but quantised weights are not read here; they "
                             f"can be {', '.join(FLOATS)}")
        return tuple(self.slices[name].get_shape())

    def fetch(self, name: str, box: Box) -> torch.Tensor:
        """The part `box` of a tensor: a view of the mapped file."""
        return self.slices[name][box]


def _opened(file):
    try:
        check_content(file)
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _files(folder):
    """The files that hold the folder's weights. ValueError where there are none, or two sets of them."""
    single, index, adapter = folder / SINGLE, folder / INDEX, folder / "adapter_config.json"
    if adapter.exists():
        raise ValueError(f"{adapter} says that an adapter (LoRA) belongs to the weights; merge it into them "
                         "with peft's merge_and_unload and save_pretrained, or remove that file")
    if single.exists() and index.exists():
        older = min(single, index, key=lambda path: path.stat().st_mtime)
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}, two sets of weights; remove the stale "
                         f"one, likely the older: {older.name}")
    if index.exists():
        return [folder / name for name in _shards(index)]
    if not single.exists():
        pickles = ("; its .bin files are pickles, which are not read here: load the folder with transformers "
                   "and save_pretrained it elsewhere") if any(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{pickles}")
    return [single]


def _shards(index):
    """The names of the files in an index: all in its folder, and there."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(x, str) for x in places.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to names of files")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} lists {name!r}, which is no safetensors file of its folder")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} lists {name}, which is not in the folder")
    return names
