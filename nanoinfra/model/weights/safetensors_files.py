"""The safetensors of a Hugging Face folder, by tensor name: one file, or several with an index.

The files are memory-mapped: reading a slice touches only the pages that hold it.
"""
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoinfra.model.weights.map_parameters_to_stored_tensors import TensorSlices
from nanoinfra.model.weights.read_json_files import check_file_is_fetched, read_json

SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")    # safetensors' names of the dtypes that can be read


class SafetensorsFolder:
    """The stored tensors of `folder`; the base model's `name_prefix` is removed from their names.

    Raises ValueError for a file that is missing or cannot be read, and for a tensor that is there twice.
    """

    def __init__(self, folder: Path, name_prefix: str):
        self.stored_slices = {}              # name without prefix -> safetensors' slice of the whole tensor
        self.folder = folder
        for file in _files(folder):
            handle = _opened(file)
            for name in handle.keys():
                key = name.removeprefix(name_prefix)
                if key in self.stored_slices:
                    raise ValueError(f"{file} holds {name}, which an earlier file of the folder holds too")
                self.stored_slices[key] = handle.get_slice(name)
        self.names = set(self.stored_slices)

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header. Raises ValueError where it is not of floats."""
        if (dtype := self.stored_slices[name].get_dtype()) not in _FLOAT_DTYPES:
            raise ValueError(f"{name} is stored as {dtype}, but quantised weights are not read here; they "
                             f"can be {', '.join(_FLOAT_DTYPES)}")
        return tuple(self.stored_slices[name].get_shape())

    def read_slices(self, name: str, slices: TensorSlices) -> torch.Tensor:
        """A part of a tensor, as a view of the mapped file."""
        return self.stored_slices[name][slices]


def _opened(file):
    try:
        check_file_is_fetched(file)
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _files(folder):
    """The files of the folder's weights. Raises ValueError where there are none, or two sets of them."""
    single, index = folder / SAFETENSORS_FILE, folder / SAFETENSORS_INDEX_FILE
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise ValueError(f"{adapter} says that an adapter (LoRA) belongs to the weights; merge it into them "
                         "with peft's merge_and_unload and save_pretrained, or remove that file")
    if single.exists() and index.exists():
        older = min(single, index, key=lambda path: path.stat().st_mtime)
        raise ValueError(f"{folder} holds both {SAFETENSORS_FILE} and {SAFETENSORS_INDEX_FILE}, two sets of "
                         f"weights; remove the stale one, likely the older: {older.name}")
    if index.exists():
        return [folder / name for name in _shards(index)]
    if not single.exists():
        pickles = ("; its .bin files are pickles, which are not read here: load the folder with transformers "
                   "and save_pretrained it elsewhere") if any(folder.glob("*.bin")) else ""
        raise ValueError(f"{folder} holds neither {SAFETENSORS_FILE} nor {SAFETENSORS_INDEX_FILE}{pickles}")
    return [single]


def _shards(index):
    """The names of the files in an index. Raises ValueError for one that is not in the index's folder."""
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
