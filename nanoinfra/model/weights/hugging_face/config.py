"""Convert a Hugging Face config.json to a ModelConfig and back, by the tables of config_fields.py.

transformers' AutoConfig interprets config.json: its defaults, its other names of keys, its older forms. Sizes
are checked before, because AutoConfig makes lists of that length. A value that the decoder does not support
is refused by name, never dropped; so is, when writing, a value for which Hugging Face has no key.
transformers is imported only when a folder is read; torch is not needed.
"""
import math
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

from nanoinfra.config import ATTENTION_LINEARS, MLP_LINEARS, MODEL_FAMILIES, ModelConfig
from nanoinfra.model.weights.call_transformers import call_transformers, import_transformers
from nanoinfra.model.weights.hugging_face.config_fields import (
    ACTIVATION_FROM_HF,
    ACTIVATION_TO_HF,
    HF_CONFIG_TABLES,
    IGNORED_HF_KEYS,
    SETTABLE_HF_KEYS,
    SLIDING_WINDOW_HF_KEYS,
    TRAINING_ONLY_HF_KEYS,
    UNDECLARED_HF_KEYS,
)
from nanoinfra.model.weights.hugging_face.rope_config import (
    canonical_rope_scaling,
    read_positive_number,
    rope_from_hf,
    rope_to_hf,
)
from nanoinfra.model.weights.read_json_files import read_json

MAX_CONFIG_VALUES = {
    "num_hidden_layers": 4096, "n_layer": 4096, "max_position_embeddings": 2**31, "n_positions": 2**31,
    "seq_length": 2**31, "sliding_window": 2**31, "original_max_position_embeddings": 2**31,
    "vocab_size": 2**26,
    **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "intermediate_size", "ffn_dim", "n_inner",
                     "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_labels"),
                    2**20)}
_BLOOM_CONTEXT = 2048                         # BLOOM's config has no context; it was trained with this one


def read_hf_config(folder: str | Path) -> ModelConfig:
    """Read the configuration of a Hugging Face folder. Raises ValueError if it is not supported."""
    path = Path(folder, "config.json")
    theirs = read_json(path)
    if not theirs and not path.exists():
        raise ValueError(f"{folder} holds no config.json; give a folder saved by save_pretrained")
    return model_config_from_hf(theirs, str(path))


def model_config_from_hf(hf_config: dict, where: str) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json. Raises ValueError, with `where`, if not supported."""
    try:
        table = _checked(hf_config)
        asking = import_transformers("Hugging Face folders").AutoConfig.for_model
        read, plain = call_transformers(where, _attributes, asking, hf_config)
        _refuse_others(table, read, plain)
        return _model(hf_config["model_type"], table, read)
    except ValueError as error:
        said = str(error).startswith(f"{where}: ")                         # call_transformers added it
        raise ValueError(str(error) if said else f"{where}: {error}") from error


def model_config_to_hf(config: ModelConfig) -> dict:
    """The Hugging Face config.json of a ModelConfig, without token ids and dtype.

    Raises ValueError, naming a field, for a value that would be read back as another.
    """
    family, config = config.family, _plain(config)
    table = HF_CONFIG_TABLES[family]
    theirs = {key: getattr(config, ours) for ours, key in table.config_keys.items()}
    theirs |= {key: config.has_bias("o" if ours == "attention_bias" else "down")
               for ours, key in table.bias_keys.items()}
    theirs |= {key: theirs[other] for key, other in table.equal_keys.items()}
    if table.activation_key:
        theirs[table.activation_key] = ACTIVATION_TO_HF[config.mlp_activation]
    if table.window_style:
        theirs |= _windows_to(table, config)
    if config.architecture.position_encoding == "rope":
        theirs |= rope_to_hf(config if table.has_rope_scaling else replace(config, rope_scaling=None))
    _check_back(config, _model(family, table, theirs))
    return {"model_type": family, "architectures": [table.model_class], **theirs}


def _checked(theirs):
    """The family's table. Raises ValueError for a config.json that transformers must not be given."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in HF_CONFIG_TABLES:
        raise ValueError(f"model_type {_shown(family)} is unknown; known are {', '.join(HF_CONFIG_TABLES)}")
    table = HF_CONFIG_TABLES[family]
    for key, most in MAX_CONFIG_VALUES.items():
        value = theirs.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{key} is {_shown(value)}, which must be a whole number from 1 to {most}")
    if not isinstance(theirs.get("auto_map", {}), dict):
        raise ValueError(f"auto_map is {_shown(theirs['auto_map'])}, which must be an object")
    declared = SLIDING_WINDOW_HF_KEYS[table.window_style]
    implementations = (None, *table.attn_implementations)
    cores = dict.fromkeys(("attn_implementation", "_attn_implementation"), implementations)
    for key, allowed in (UNDECLARED_HF_KEYS | cores).items():
        if key in theirs and key not in declared and not _among(theirs[key], allowed):
            raise ValueError(f"{key} is {_shown(theirs[key])}, which this decoder does not have")
    return table


def _attributes(asking, theirs):
    """The attributes of transformers' configuration, and the defaults of the declared ones."""
    family = theirs["model_type"]
    given = {key: deepcopy(value) for key, value in theirs.items()
             if key not in ("model_type", "auto_map")}                       # a copy: transformers changes it
    plain = asking(family)
    declared = {field.name: getattr(plain, field.name) for field in fields(plain)}
    for key in given.keys() - {*declared, *plain.attribute_map, *SETTABLE_HF_KEYS}:
        if hasattr(plain, key):
            raise ValueError(f"the key {key!r} would replace a part of transformers' own class")
    config = asking(family, **given)
    if hasattr(config, "rope_parameters"):
        config.standardize_rope_params()     # as before RoPE is computed, when all attributes are there
    return vars(config), declared


def _refuse_others(table, read, plain):
    """Raise ValueError for an attribute that changes the computation and has an unsupported value."""
    known = {*table.config_keys.values(), table.activation_key, *table.bias_keys.values(),
             *SLIDING_WINDOW_HF_KEYS[table.window_style],
             *table.equal_keys, *IGNORED_HF_KEYS, *TRAINING_ONLY_HF_KEYS, *table.ignored_keys,
             "rope_parameters"}
    for key, other in table.equal_keys.items():
        if read[key] != read[other]:
            raise ValueError(f"{key} is {_shown(read[key])}, but this decoder has only {read[other]}, as "
                             f"{other}")
    for key in plain.keys() - known:
        allowed = table.supported_values.get(key, (plain[key],))
        if read[key] not in allowed:
            raise ValueError(f"{key} is {_shown(read[key])}, but this decoder has only {allowed[0]!r}")
    for key in TRAINING_ONLY_HF_KEYS & plain.keys():        # transformers refuses other values
        most = 1 if "drop" in key else math.inf
        if read[key] is not None and not 0 <= read[key] <= most:
            raise ValueError(f"{key} is {_shown(read[key])}, which must be a number from 0 to {most}")
    pad, vocab = read["pad_token_id"], read["vocab_size"]
    if table.pad_token_in_vocab and pad is not None and not -vocab <= pad < vocab:
        raise ValueError(f"pad_token_id is {_shown(pad)}, which is no token of {vocab}")


def _model(family, table, read):
    """The ModelConfig of a configuration's attributes."""
    width, heads = (_whole(read, table.config_keys[ours]) for ours in ("width", "heads"))
    silent = {"kv_heads": heads, "head_dim": width // heads, "hidden": 4 * width, "context": _BLOOM_CONTEXT}
    if width < heads or table.heads_divide_width and width % heads:
        raise ValueError(f"{heads} heads do not divide the width of {width}")
    given = silent | {ours: _whole(read, key) for ours, key in table.config_keys.items()
                      if ours not in ("eps", "tied") and not _absent(read, key)}
    given |= {ours: read[key] for ours, key in table.bias_keys.items()}
    given["tied"] = read["tie_word_embeddings"]
    if "eps" in table.config_keys:
        given["eps"] = float(read_positive_number(read, table.config_keys["eps"]))
    if table.activation_key:
        given["activation"] = _activation(table.activation_key, read[table.activation_key])
    if table.window_style:
        given |= _windows(table, read)
    if "rope_parameters" in read and MODEL_FAMILIES[family].position_encoding == "rope":
        rope = rope_from_hf(read["rope_parameters"], given["context"], given["head_dim"])
        given["theta"], given["rope_scaling"], given["context"] = rope
    return _plain(ModelConfig(family=family, **given))


def _absent(read, key):
    """Whether the family's default holds: GPT-2's n_inner and BLOOM's seq_length can be null."""
    return key not in read or (read[key] is None and key in ("n_inner", "seq_length"))


def _activation(key, name):
    if name not in ACTIVATION_FROM_HF:
        raise ValueError(f"{key} is {_shown(name)}, but this decoder has only "
                         f"{', '.join(ACTIVATION_FROM_HF)}")
    return ACTIVATION_FROM_HF[name]


def _windows(table, read):
    """The fields `window` and `full_layers` of ModelConfig."""
    window, full = read["sliding_window"], 0
    if table.window_style == "layered":
        kinds = read["layer_types"]
        full = next((layer for layer, kind in enumerate(kinds) if kind != "full_attention"), len(kinds))
        if set(kinds[full:]) - {"sliding_attention"}:
            raise ValueError(f"layer_types is {_shown(kinds)}, but layers with a window follow those without "
                             "here, and there are no others")
        if full == len(kinds):
            return {}
        if window is None:
            raise ValueError("layer_types has layers with a window, but sliding_window is not set (or "
                             "use_sliding_window is false)")
    return {"window": window if window is None else _whole(read, "sliding_window"), "full_layers": full}


def _windows_to(table, config):
    if table.window_style == "all":               # these families have no key for full_layers
        return {"sliding_window": config.window}
    kinds = ["full_attention" if config.sliding_window_of_layer(layer) is None else "sliding_attention"
             for layer in range(config.layers)]
    return {"use_sliding_window": config.window is not None, "sliding_window": config.window,
            "max_window_layers": kinds.count("full_attention"), "layer_types": kinds}


def _check_back(config, back):
    for name in (field.name for field in fields(ModelConfig)):
        want, got = getattr(config, name), getattr(back, name)
        if got != want:
            raise ValueError(f"Hugging Face's {config.family} cannot hold {name}={want}: it would be read "
                             f"back as {got}; try {name}={got}")


def _plain(config):
    """`config` in canonical form, as `model_config_from_hf` gives it."""
    architecture = config.architecture
    sliding = config.window is not None and config.full_layers < config.layers
    biases = {"attention_bias": ATTENTION_LINEARS, "mlp_bias": MLP_LINEARS[not architecture.gated_mlp:]}
    biases = {name: None if all(config.has_bias(x) == (x in architecture.biased_linears) for x in linears)
              else getattr(config, name) for name, linears in biases.items()}
    activation = None if config.mlp_activation == architecture.mlp_activation else config.mlp_activation
    return replace(config, activation=activation,
                   window=config.window if sliding else None,
                   full_layers=config.full_layers if sliding else 0,
                   rope_scaling=canonical_rope_scaling(config), **biases)


def _whole(read, key):
    value = read[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {_shown(value)}, which must be a whole number more than 0")
    return value


def _among(value, allowed):
    """Whether `value` is in `allowed`, with its type: in Python True equals 1."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _shown(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
