"""A Hugging Face folder's config.json as a ModelConfig and back, by the tables of hf_fields.py.

What config.json says, transformers' AutoConfig says: its defaults, its other names for keys, its older forms.
Sizes are looked at before, since AutoConfig makes lists as long as they say. Whatever asks for what the
decoder does not have is refused by name, never dropped; so is, on the way out, what their format has no key
for. transformers is imported when a folder is read, and only then; torch is not needed.
"""
import math
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

from nanoinfra.config import ATTENTION, FAMILIES, MLP, ModelConfig
from nanoinfra.model.weights.hugging_face.config_fields import (
    ACTIVATIONS,
    HARMLESS,
    RANDOM,
    SETTABLE,
    TABLES,
    UNDECLARED,
    WINDOWS,
    WRITTEN,
)
from nanoinfra.model.weights.hugging_face.rope_config import number, plain_scaling, rope_from, rope_to
from nanoinfra.model.weights.import_transformers import asked, transformers
from nanoinfra.model.weights.json_files import read_json

LARGEST = {"num_hidden_layers": 4096, "n_layer": 4096, "max_position_embeddings": 2**31, "n_positions": 2**31,
           "seq_length": 2**31, "sliding_window": 2**31, "original_max_position_embeddings": 2**31,
           "vocab_size": 2**26,
           **dict.fromkeys(("hidden_size", "n_embd", "n_embed", "intermediate_size", "ffn_dim", "n_inner",
                            "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "num_labels"),
                           2**20)}
BLOOM_CONTEXT = 2048                         # it has no longest sequence: this is what BLOOM was trained with


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder. ValueError where it is none that this decoder has."""
    path = Path(folder, "config.json")
    theirs = read_json(path)
    if not theirs and not path.exists():
        raise ValueError(f"{folder} holds no config.json; give a folder saved by save_pretrained")
    return config_from(theirs, str(path))


def config_from(theirs: dict, where: str) -> ModelConfig:
    """Their config.json as a ModelConfig. Raises ValueError, with `where`, for what we do not compute."""
    try:
        table = _checked(theirs)
        asking = transformers("Hugging Face folders").AutoConfig.for_model
        read, plain = asked(where, _attributes, asking, theirs)
        _refuse_others(table, read, plain)
        return _model(theirs["model_type"], table, read)
    except ValueError as error:
        said = str(error).startswith(f"{where}: ")                         # by `asked`
        raise ValueError(str(error) if said else f"{where}: {error}") from error


def config_to(config: ModelConfig) -> dict:
    """A ModelConfig as their config.json; token ids and dtype are the writer's to add.

    Raises ValueError, naming a field, for what would be read back as something else.
    """
    family, config = config.family, _plain(config)
    table = TABLES[family]
    theirs = {key: getattr(config, ours) for ours, key in table.fields.items()}
    theirs |= {key: config.has_bias("o" if ours == "attention_bias" else "down")
               for ours, key in table.biases.items()}
    theirs |= {key: theirs[other] for key, other in table.same.items()}
    if table.activation:
        theirs[table.activation] = WRITTEN[config.act]
    if table.windows:
        theirs |= _windows_to(table, config)
    if config.parts.position == "rope":
        theirs |= rope_to(config if table.scaled else replace(config, rope_scaling=None))
    _check_back(config, _model(family, table, theirs))
    return {"model_type": family, "architectures": [table.architecture], **theirs}


def _checked(theirs):
    """The family's table, for a config.json that transformers may be given."""
    family = theirs.get("model_type")
    if not isinstance(family, str) or family not in TABLES:
        raise ValueError(f"model_type {_shown(family)} is unknown; known are {', '.join(TABLES)}")
    table = TABLES[family]
    for key, most in LARGEST.items():
        value = theirs.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{key} is {_shown(value)}, which must be a whole number from 1 to {most}")
    if not isinstance(theirs.get("auto_map", {}), dict):
        raise ValueError(f"auto_map is {_shown(theirs['auto_map'])}, which must be an object")
    declared = WINDOWS[table.windows]
    cores = dict.fromkeys(("attn_implementation", "_attn_implementation"), (None, *table.cores))
    for key, allowed in (UNDECLARED | cores).items():
        if key in theirs and key not in declared and not _among(theirs[key], allowed):
            raise ValueError(f"{key} is {_shown(theirs[key])}, which this decoder does not have")
    return table


def _attributes(asking, theirs):
    """The attributes of transformers' configuration, and the declared ones of one that says nothing."""
    family = theirs["model_type"]
    given = {key: deepcopy(value) for key, value in theirs.items()          # transformers writes into it
             if key not in ("model_type", "auto_map")}
    plain = asking(family)
    declared = {field.name: getattr(plain, field.name) for field in fields(plain)}
    for key in given.keys() - {*declared, *plain.attribute_map, *SETTABLE}:
        if hasattr(plain, key):
            raise ValueError(f"the key {key!r} would replace a part of transformers' own class")
    config = asking(family, **given)
    if hasattr(config, "rope_parameters"):
        config.standardize_rope_params()     # once more, as before RoPE is computed: all attributes are there
    return vars(config), declared


def _refuse_others(table, read, plain):
    """Raise ValueError for an attribute that changes the mathematics and is not at what the decoder has."""
    known = {*table.fields.values(), table.activation, *table.biases.values(), *WINDOWS[table.windows],
             *table.same, *HARMLESS, *RANDOM, *table.harmless, "rope_parameters"}
    for key, other in table.same.items():
        if read[key] != read[other]:
            raise ValueError(f"{key} is {_shown(read[key])}, but this decoder has only {read[other]}, as "
                             f"{other}")
    for key in plain.keys() - known:
        allowed = table.fixed.get(key, (plain[key],))
        if read[key] not in allowed:
            raise ValueError(f"{key} is {_shown(read[key])}, but this decoder has only {allowed[0]!r}")
    for key in RANDOM & plain.keys():        # transformers builds no model with others
        most = 1 if "drop" in key else math.inf
        if read[key] is not None and not 0 <= read[key] <= most:
            raise ValueError(f"{key} is {_shown(read[key])}, which must be a number from 0 to {most}")
    pad, vocab = read["pad_token_id"], read["vocab_size"]
    if table.pads and pad is not None and not -vocab <= pad < vocab:
        raise ValueError(f"pad_token_id is {_shown(pad)}, which is no token of {vocab}")


def _model(family, table, read):
    """The ModelConfig of a configuration's attributes."""
    width, heads = (_whole(read, table.fields[ours]) for ours in ("width", "heads"))
    silent = {"kv_heads": heads, "head_dim": width // heads, "hidden": 4 * width, "context": BLOOM_CONTEXT}
    if width < heads or table.whole_heads and width % heads:
        raise ValueError(f"{heads} heads do not divide the width of {width}")
    given = silent | {ours: _whole(read, key) for ours, key in table.fields.items()
                      if ours not in ("eps", "tied") and not _absent(read, key)}
    given |= {"tied": read["tie_word_embeddings"], **{ours: read[key] for ours, key in table.biases.items()}}
    if "eps" in table.fields:
        given["eps"] = float(number(read, table.fields["eps"]))
    if table.activation:
        given["activation"] = _activation(table.activation, read[table.activation])
    if table.windows:
        given |= _windows(table, read)
    if "rope_parameters" in read and FAMILIES[family].position == "rope":
        rope = rope_from(read["rope_parameters"], given["context"], given["head_dim"])
        given["theta"], given["rope_scaling"], given["context"] = rope
    return _plain(ModelConfig(family=family, **given))


def _absent(read, key):
    """Is what this attribute means left to the family? GPT-2's n_inner and BLOOM's seq_length may be null."""
    return key not in read or (read[key] is None and key in ("n_inner", "seq_length"))


def _activation(key, name):
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {_shown(name)}, but this decoder has only {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _windows(table, read):
    """`window` and `full_layers`."""
    window, full = read["sliding_window"], 0
    if table.windows == "layered":
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
    if table.windows == "all":               # and full_layers have no key
        return {"sliding_window": config.window}
    kinds = ["full_attention" if config.window_of(layer) is None else "sliding_attention"
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
    """`config` in the one way of saying the same that `config_from` uses."""
    parts, sliding = config.parts, config.window is not None and config.full_layers < config.layers
    biases = {"attention_bias": ATTENTION, "mlp_bias": MLP[not parts.gated:]}
    biases = {name: None if all(config.has_bias(x) == (x in parts.biases) for x in linears)
              else getattr(config, name) for name, linears in biases.items()}
    return replace(config, activation=None if config.act == parts.activation else config.act,
                   window=config.window if sliding else None,
                   full_layers=config.full_layers if sliding else 0,
                   rope_scaling=plain_scaling(config), **biases)


def _whole(read, key):
    value = read[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} is {_shown(value)}, which must be a whole number more than 0")
    return value


def _among(value, allowed):
    """(True is 1 in Python.)"""
    return any(type(value) is type(one) and value == one for one in allowed)


def _shown(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
