"""Their config.json as a ModelConfig and back, by the tables of hf_names.py.

What an option asks for and the decoder does not have is refused by name, never dropped; so is, on the way
out, what their format has no key for.
"""
from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.hf_names import DIALECTS

ONE_WIDTH = {"gpt2": "GPT-2", "opt": "OPT", "bloom": "BLOOM"}     # H K = KV K = C, by name


def config_from(theirs: dict, where: str) -> ModelConfig:
    """Their config.json as a ModelConfig. Raises ValueError, with `where`, for what we do not compute."""
    family = theirs.get("model_type")
    if family not in DIALECTS:
        raise ValueError(f"{where}: model_type {family!r} is unknown; known are {', '.join(DIALECTS)}")
    dialect = DIALECTS[family]
    for old, key in dialect.aliases.items():
        theirs = {**theirs, key: theirs.get(old)} if theirs.get(key) is None else theirs
    for key, allowed in dialect.fixed.items():
        if theirs.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{where}: {key} is {theirs[key]!r}, but this decoder has only {allowed[0]!r}")
    given = {ours: theirs[key] for ours, key in dialect.keys.items() if theirs.get(key) is not None}
    given = _rope(theirs, where) | given
    width = given.get("width", 0)
    for key, times in dialect.widths.items():
        if theirs.get(key) not in (None, times * width):
            raise ValueError(f"{where}: {key} is {theirs[key]!r}, but this decoder has only {times * width}")
    given = _defaults(family, width, given.get("heads", 1)) | given
    if missing := set(dialect.keys) - {*given, "theta"}:
        raise ValueError(f"{where} does not say {', '.join(sorted(dialect.keys[key] for key in missing))}")
    return ModelConfig(family=family, **given)


def config_to(config: ModelConfig) -> dict:
    """A ModelConfig as their config.json; token ids and dtype are the writer's to add."""
    dialect = DIALECTS[config.family]
    name = ONE_WIDTH.get(config.family)
    if name and not config.heads == config.kv_heads == config.width / config.head_dim:
        raise ValueError(f"Hugging Face's {name} has one width: {config.heads} heads and {config.kv_heads} "
                         f"KV heads of {config.head_dim} do not each make {config.width}; "
                         f"try {config.heads} heads of each kind, {config.width // config.heads} wide")
    for ours, value in _defaults(config.family, config.width, config.heads).items():
        if ours not in dialect.keys and getattr(config, ours) != value:
            raise ValueError(f"Hugging Face's {config.family} has no key for {ours}, which is always {value} "
                             f"there; here it is {getattr(config, ours)}: try {ours}={value}")
    theirs = {key: getattr(config, ours) for ours, key in dialect.keys.items()}
    if config.parts.position == "rope":
        theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": config.theta}
    return {"model_type": config.family, "architectures": [dialect.architecture], **theirs}


def _defaults(family, width, heads):
    """ModelConfig's fields where their configuration is silent."""
    found = {"kv_heads": heads, "tied": DIALECTS[family].tied, **DIALECTS[family].defaults}
    found |= {"head_dim": width // heads} if family != "qwen3" else {}
    return found | ({"hidden": 4 * width} if family in ("gpt2", "bloom") else {})


def _rope(theirs, where):
    """RoPE's base; newer files keep it in rope_parameters, older ones keep stretched RoPE in rope_scaling."""
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{where}: RoPE is scaled ({kind!r}), but this decoder has the plain one only")
    return {"theta": given["rope_theta"]} if "rope_theta" in given else {}
