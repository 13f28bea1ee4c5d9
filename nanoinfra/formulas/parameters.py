"""The parameters of a decoder: the shape of each by its name, and exact counts. No model is built for it.

The names are those of model/decoder.py's `named_parameters()`. A tied head counts once, as embedding.
GPT-2: Psi = 12 L C^2 (1 + 13/(12 C) + (V + T)/(12 L C)) + 2 C: Narayanan et al. 2021, equation 2, and the
2 C of the final norm, which the paper leaves out. OPT has the same; BLOOM has no T C, and 2 C more.
V vocabulary, C width, L layers, H query heads, KV key/value heads, K head_dim, F hidden, T context.
"""
from math import prod

from nanoinfra.config import ModelConfig

MODEL_PARTS = ("embedding", "positions", "attention", "mlp", "norms", "head")


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters; a tied head counts once."""
    return sum(parameter_count_by_part(config).values())


def parameter_count_by_part(config: ModelConfig) -> dict[str, int]:
    """The number of parameters in each of `MODEL_PARTS`.

    A bias counts with its matrix; the norms of q and k count with the norms.
    """
    count = dict.fromkeys(MODEL_PARTS, 0)
    for name, shape in parameter_shapes(config).items():
        count[part_of_parameter(name)] += prod(shape)
    return count


def part_of_parameter(parameter_name: str) -> str:
    """The one of `MODEL_PARTS` to which this parameter belongs. Raises ValueError for an unknown name."""
    for word, part in (("norm", "norms"), (".attn.", "attention"), (".mlp.", "mlp"),
                       ("embed.", "embedding"), ("positions.", "positions"), ("head.", "head")):
        if word in parameter_name:
            return part
    raise ValueError(f"no decoder has a parameter named {parameter_name!r}; try one of the names that "
                     "parameter_shapes() returns")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, in the order of `named_parameters()`; matrices are (out, in)."""
    V, C = config.vocab, config.width
    found = {"embed.weight": (V, C)}
    if config.architecture.position_encoding == "learned":
        found["positions.weight"] = (config.context, C)
    if config.architecture.embed_norm:
        found |= _norm("embed_norm", config)
    block = block_parameter_shapes(config)
    for i in range(config.layers):
        found |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    found |= _norm("norm", config)
    return found if config.tied else found | {"head.weight": (V, C)}


def block_parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of one block (layer), by its name inside the block."""
    C, F, K = config.width, config.hidden, config.head_dim
    queries, keys = config.heads * K, config.kv_heads * K
    found = _norm("norm1", config)
    for name, outputs, inputs in (("q", queries, C), ("k", keys, C), ("v", keys, C), ("o", C, queries)):
        found |= _linear(f"attn.{name}", outputs, inputs, config)
    if config.architecture.qk_norm:
        found |= {"attn.q_norm.weight": (K,), "attn.k_norm.weight": (K,)}
    found |= _norm("norm2", config)
    if config.architecture.gated_mlp:
        found |= _linear("mlp.gate", F, C, config)
    return found | _linear("mlp.up", F, C, config) | _linear("mlp.down", C, F, config)


def _linear(name, outputs, inputs, config):
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if config.has_bias(name.split(".")[1]) else weight


def _norm(name, config):
    weight = {f"{name}.weight": (config.width,)}
    return weight | {f"{name}.bias": (config.width,)} if config.architecture.norm_type == "layer" else weight
