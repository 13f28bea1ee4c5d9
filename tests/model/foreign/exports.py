"""Every feature of ModelConfig written as a Hugging Face folder, and read again by transformers and by us."""
import itertools
from dataclasses import replace
from functools import partial

import torch

from nanoinfra.config import (
    ACTIVATION_NAMES,
    ATTENTION_LINEARS,
    MLP_LINEARS,
    MODEL_FAMILIES,
    ModelConfig,
    RopeScaling,
)
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from tests.model.foreign.judge import Case, Fault, ours
from tests.model.foreign.models import compare, theirs, write_model
from tests.model.foreign.models import raw as raw_config
from tests.model.twins import scrambled

SCALINGS = {
    "linear": RopeScaling("linear", 2.0, 0),
    "dynamic": RopeScaling("dynamic", 2.0, 20),
    "yarn": RopeScaling("yarn", 4.0, 10),
    "yarn whole": RopeScaling("yarn", 4.0, 10, truncate=False),
    "yarn attention": RopeScaling("yarn", 4.0, 10, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
    "llama3": RopeScaling("llama3", 4.0, 10, 1.0, 4.0),
    "llama3 low": RopeScaling("llama3", 8.0, 10, 0.5, 2.0),
    "factors": RopeScaling("factors", factors=(1.0, 1.5, 2.0, 4.0)),
}
ROTARY = tuple(name for name, parts in MODEL_FAMILIES.items() if parts.position_encoding == "rope")
HOME = {  # families whose configuration class can say such a thing
    "attention_bias": ("llama", "qwen3"),
    "mlp_bias": ("llama",),
    "window": ("mistral", "phi3", "qwen2", "qwen3"),
    "full_layers": ("qwen2", "qwen3"),
    "rope_scaling": ("llama", "mistral", "qwen2", "qwen3"),
    "eps": (*ROTARY, "gpt2", "bloom"),
    "kv_heads": ROTARY,
    "head_dim": ("llama", "mistral", "qwen3"),
    "theta": ROTARY,
    "hidden": (*ROTARY, "gpt2", "opt"),
    "context": (*ROTARY, "gpt2", "opt"),
    "activation": (*ROTARY, "gpt2", "opt"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def base(family: str, **given) -> ModelConfig:
    """A small decoder of a family."""
    kv_heads, hidden = 2 if family in ROTARY else 4, 128 if family == "bloom" else 44
    return replace(
        ModelConfig(
            vocab=61,
            width=32,
            layers=2,
            heads=4,
            kv_heads=kv_heads,
            head_dim=8,
            hidden=hidden,
            context=40,
            family=family,
            theta=500.0 if family in ROTARY else 1e4,
        ),
        **given,
    )


def export_cases() -> list[Case]:
    """Each feature in each family, pairs of features, dtypes, and folders that hold an earlier export."""
    made = []
    for family in MODEL_FAMILIES:
        features = {
            field: values
            for field, values in FEATURES.items()
            if family in ROTARY or field not in ("rope_scaling", "theta")
        }
        for field, values in features.items():
            for name, value in values.items():
                must = family in HOME.get(field, MODEL_FAMILIES) and name != "factors"
                made.append(_case(f"{family} {field} {name}", family, {field: value}, must))
        for (one, some), (two, others) in itertools.combinations(features.items(), 2):
            first, second = list(some.values())[-1], list(others.values())[0]
            made.append(_case(f"{family} {one} and {two}", family, {one: first, two: second}, False))
        made += [
            _again(f"{family} {shard} then {then} bytes", family, shard, then)
            for shard, then in ((3000, 10**9), (10**9, 3000), (3000, 9000), (9000, 3000))
        ]
    made += [_case(f"llama as {dtype}", "llama", {}, True, dtype) for dtype in DTYPES]
    made += [
        _case(
            f"llama into a folder with {name}",
            "llama",
            {},
            name not in ("a .bin", "an adapter"),
            before=before,
        )
        for name, before in BEFORE.items()
    ]
    return made


FEATURES = {
    "tied": {"yes": True, "no": False},
    "eps": {"small": 1e-6, "large": 1e-2},
    "theta": {"million": 1e6},
    "kv_heads": {"one": 1, "all": 4},
    "head_dim": {"16": 16, "6": 6},
    "activation": {name: name for name in ACTIVATION_NAMES},
    "attention_bias": {"yes": True, "no": False},
    "mlp_bias": {"yes": True, "no": False},
    "window": {"7": 7, "1": 1, "40": 40},
    "full_layers": {"1": 1, "2": 2},
    "rope_scaling": SCALINGS,
    "context": {"16": 16, "64": 64},
    "hidden": {"17": 17},
    "layers": {"1": 1},
    "vocab": {"100": 100},
}


def _case(name, family, given, must, dtype=torch.float32, before=lambda folder: None):
    if "full_layers" in given and "window" not in given:
        given = given | {"window": 7}

    def judge(folder):
        before(folder)
        model = _model(ours(base, family, **given), dtype)
        ours(save_hf_model, model, folder)
        return _judge(model, folder)

    return Case(f"export {name}", lambda folder: None, judge, must=must)


def _again(name, family, shard, then):
    def judge(folder):
        ours(save_hf_model, _model(base(family), torch.float32, seed=5), folder, shard_bytes=shard)
        model = _model(base(family))
        ours(save_hf_model, model, folder, shard_bytes=then)
        return _judge(model, folder)

    return Case(f"export {name}", lambda folder: None, judge, must=True)


def _model(config, dtype=torch.float32, seed=0):
    return scrambled(ours(Decoder, config), seed).to(dtype)


def _judge(model, folder):
    try:
        other = theirs(folder)
    except Exception as error:
        raise Fault(f"exported, and transformers does not open it: {str(error)[:200]}") from error
    back = ours(load_hf_model, folder)
    for what, got, want in zip(_MEANING, _meaning(back.config), _meaning(model.config)):
        if got != want:
            raise Fault(f"{what} read back is {got}, not {want}")
    wide = [parameter.detach().float() for parameter in model.parameters()]
    if not all(torch.equal(a, b) for a, b in zip(back.parameters(), wide, strict=True)):
        raise Fault("other weights read back than written")
    return compare(back, other)


_MEANING = ("sizes", "family, tied, eps", "activation", "biases", "windows", "theta, scaling")


def _meaning(config):
    """What a configuration says, however it says it; in the order of _MEANING."""
    sizes = (
        config.vocab,
        config.width,
        config.layers,
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.hidden,
        config.context if config.architecture.position_encoding != "alibi" else None,
    )
    windows = [
        min(config.sliding_window_of_layer(layer) or config.context,
            config.context) for layer in range(config.layers)
    ]
    return (
        sizes,
        (config.family, config.tied, config.eps),
        config.mlp_activation,
        [config.has_bias(x) for x in (*ATTENTION_LINEARS, *MLP_LINEARS)],
        windows,
        (config.theta, config.rope_scaling) if config.family in ROTARY else None,
    )


def _shards(folder):
    save_hf_model(_model(base("llama"), seed=9), folder, shard_bytes=2000)


BEFORE = {
    "another model": partial(write_model, config=raw_config("gpt2")),
    "shards": _shards,
    "a .bin": lambda folder: torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin"),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "a generation config": lambda folder: (folder / "generation_config.json").write_text(
        '{"eos_token_id": 7}'
    ),
}
