"""How many parameters a decoder has, exactly: one map from name to shape, and sums over it.

GPT-2: Psi = 12 L C^2 (1 + 13/(12 C) + (V + T)/(12 L C)) + 2 C: Narayanan et al. 2021, equation 2, and the
2 C of the final norm, which the paper leaves out. OPT has the same, BLOOM no T C and 2 C more. A tied head
counts once, as embedding. The map names what `model/decoder.py` names, so that anyone can know a model's
tensors without building it.
V vocabulary, C width, L layers, H query heads, KV key/value heads, K head_dim, F hidden, T context.
"""
from math import prod

from nanoinfra.config import ModelConfig

PARTS = ("embedding", "positions", "attention", "mlp", "norms", "head")


def parameters(config: ModelConfig) -> int:
    """Number of parameters, a tied head counted once."""
    return sum(parameters_by_part(config).values())


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Number of parameters in each of `PARTS`; biases go with their matrix, q's and k's norms with norms."""
    count = dict.fromkeys(PARTS, 0)
    for name, shape in shapes(config).items():
        count[part_of(name)] += prod(shape)
    return count


def part_of(name: str) -> str:
    """The one of `PARTS` that the parameter called `name` belongs to."""
    for word, part in (("norm", "norms"), (".attn.", "attention"), (".mlp.", "mlp"),
                       ("embed.", "embedding"), ("positions.", "positions"), ("head.", "head")):
        if word in name:
            return part
    raise ValueError(f"no decoder has a parameter named {name!r}; try one of the names that shapes() returns")


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, in the order of `named_parameters()`; matrices are (out, in)."""
    V, C = config.vocab, config.width
    found = {"embed.weight": (V, C)}
    if config.parts.position == "learned":
        found["positions.weight"] = (config.context, C)
    if config.parts.embed_norm:
        found |= _norm("embed_norm", config)
    block = block_shapes(config)
    for i in range(config.layers):
        found |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    found |= _norm("norm", config)
    return found if config.tied else found | {"head.weight": (V, C)}


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one block, by its name inside the block."""
    C, F, K = config.width, config.hidden, config.head_dim
    queries, keys = config.heads * K, config.kv_heads * K
    found = _norm("norm1", config)
    for name, outputs, inputs in (("q", queries, C), ("k", keys, C), ("v", keys, C), ("o", C, queries)):
        found |= _linear(f"attn.{name}", outputs, inputs, config)
    if config.parts.qk_norm:
        found |= {"attn.q_norm.weight": (K,), "attn.k_norm.weight": (K,)}
    found |= _norm("norm2", config)
    if config.parts.gated:
        found |= _linear("mlp.gate", F, C, config)
    return found | _linear("mlp.up", F, C, config) | _linear("mlp.down", C, F, config)


def _linear(name, outputs, inputs, config):
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if config.has_bias(name.split(".")[1]) else weight


def _norm(name, config):
    weight = {f"{name}.weight": (config.width,)}
    return weight | {f"{name}.bias": (config.width,)} if config.parts.norm == "layer" else weight
