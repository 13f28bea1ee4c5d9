"""Model folders as transformers writes them, with random weights, and the comparison of logits."""
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nanoinfra.model.weights.load_model import load_model
from tests.model.foreign.judge import CLOSE, Fault, ours
from tests.model.twins import scrambled

ABSENT = object()  # a key that config.json lacks
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BASES = {
    "gpt2": {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "n_inner": 44,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": LLAMA | {"rope_theta": 500.0},
    "mistral": LLAMA | {"rope_theta": 500.0, "sliding_window": 9},
    "phi3": LLAMA | {"rope_theta": 500.0, "original_max_position_embeddings": 40},
    "qwen2": LLAMA | {"rope_theta": 500.0},
    "qwen3": LLAMA | {"rope_theta": 500.0, "head_dim": 12},
    "opt": {
        "vocab_size": 61,
        "hidden_size": 32,
        "ffn_dim": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "word_embed_proj_dim": 32,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "bloom": {
        "vocab_size": 61,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "seq_length": 40,
    },
}
_weights = {}  # family -> state of a model of BASES[family]


def raw(family: str, **edits) -> dict:
    """config.json of a family's base model with some keys set, or gone where ABSENT."""
    given = {"model_type": family, **BASES[family], **edits}
    return {key: value for key, value in given.items() if value is not ABSENT}


def write_model(folder: Path, config: dict, build: bool = True) -> None:
    """A folder with this config.json, and weights that transformers makes for it (or of the base model)."""
    try:
        if not build:
            raise ValueError("weights of the base model will do")
        model = built(config)
    except Exception:
        family = config.get("model_type")
        family = family if isinstance(family, str) and family in BASES else "llama"
        if family not in _weights:
            _weights[family] = built(raw(family))
        model = _weights[family]
    model.save_pretrained(folder)
    write_config(folder, config)


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def built(config: dict):
    """transformers' model for a config.json, every parameter drawn at random."""
    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    return scrambled(AutoModelForCausalLM.from_config(made, attn_implementation="eager").float()).eval()


def theirs(folder: Path):
    """transformers' model of a folder. Fault where weights were missing, surplus or misshapen."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            raise Fault(f"opened, where transformers has {key}: {sorted(map(str, report[key]))[:3]}")
    return model.eval()


@torch.no_grad()
def opens_there(folder: Path) -> bool:
    """Does transformers open a folder, with nothing missing, and say finite numbers?"""
    try:
        return bool(theirs(folder)(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all())
    except Exception:
        return False


def lengths(config) -> Iterable[int]:
    """Lengths below and beyond every border of ours: window, original context, context."""
    scaling = config.rope_scaling
    borders = [5, config.window or 5, scaling.original_context if scaling else 5, 40, config.context]
    return sorted({n for at in borders for n in (at, at + 1) if 0 < n <= min(config.context, 130)})


@torch.no_grad()
def compare(model, other, at_least: int = 0) -> str:
    """ "equal", or Fault where logits differ anywhere for any of two sequences of any length."""
    if model.config.context < at_least:
        raise Fault(f"its context is {model.config.context}, and must be {at_least}")
    draws = torch.Generator().manual_seed(1)
    for n in lengths(model.config):
        x = torch.randint(0, other.config.vocab_size, (2, n), generator=draws)
        got, want = ours(model, x), other(x).logits
        if got.shape != want.shape:
            raise Fault(f"logits of shape {tuple(got.shape)} where transformers has {tuple(want.shape)}")
        alike = got.isfinite() == want.isfinite()
        off = (got - want).abs().nan_to_num(0.0).max().item() if alike.all() else math.inf
        if off > CLOSE:
            raise Fault(f"silent difference: {off:.2g} at length {n}, logits vary by {want.std():.2g}")
    return "equal"


def same_logits(folder: Path, at_least: int = 0) -> str:
    """The judge of a model folder."""
    model, _, _ = ours(load_model, folder)
    try:
        other = theirs(folder)
        other(torch.ones(1, 1, dtype=torch.long))
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"opened, where transformers fails: {str(error)[:150] or type(error)}") from error
    return compare(model, other, at_least)
