"""The parameters of a decoder: the shape of each by its name, a part of one, exact counts; without a model.

The names are those of model/decoder.py's `named_parameters()`. A tied head counts once, as embedding.
GPT-2: Psi = 12 L C^2 (1 + 13/(12 C) + (V + T)/(12 L C)) + 2 C: Narayanan et al. 2021, equation 2, and the
2 C of the final norm, which the paper leaves out. OPT has the same; BLOOM has no T C, and 2 C more.
V vocabulary, C width, L layers, H query heads, KV key/value heads, K head_dim, F hidden, T context.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class TensorShard:
    """The part of the logical tensor `name`, of shape `full_shape`, that is the box [offset, offset + size).

    A part of a box is a box, so ZeRO's row range inside tensor parallelism's row or column range is again one
    range per dim, and a rank of any mesh finds what it needs in the shards of any other mesh by intersecting
    boxes: checkpoint resharding. Raises ValueError for a box that lies outside of the tensor.
    """
    name: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    full_shape: tuple[int, ...]

    def __post_init__(self):
        places = list(zip(self.offset, self.size, self.full_shape))
        if not (len(self.offset) == len(self.size) == len(self.full_shape)
                and all(0 <= o and 0 <= s and o + s <= f for o, s, f in places)):
            raise ValueError(f"{self.name}: no box of size {list(self.size)} at {list(self.offset)} fits "
                             f"in a tensor of shape {list(self.full_shape)}; slice it from "
                             "TensorShard.of_whole_tensor(name, shape)")

    @classmethod
    def of_whole_tensor(cls, name: str, shape: Sequence[int]) -> "TensorShard":
        """The shard that is the whole tensor."""
        return cls(name, (0,) * len(shape), tuple(shape), tuple(shape))

    def slice_dim(self, dim: int, start: int, stop: int) -> "TensorShard":
        """The part from `start` up to `stop` along `dim`, counted within this shard, so slices compose."""
        if not 0 <= start <= stop <= self.size[dim]:
            raise ValueError(f"cannot cut {start}:{stop} from the {self.size[dim]} places of {self.file_key} "
                             f"in dim {dim}; count from its own start")
        offset, size = list(self.offset), list(self.size)
        offset[dim], size[dim] = self.offset[dim] + start, stop - start
        return replace(self, offset=tuple(offset), size=tuple(size))

    def intersect(self, other: "TensorShard") -> "TensorShard | None":
        """The box that two shards of one tensor share; None when they share no element."""
        begin = [max(a, b) for a, b in zip(self.offset, other.offset)]
        end = [min(a + m, b + n) for a, m, b, n in zip(self.offset, self.size, other.offset, other.size)]
        if any(b >= e for b, e in zip(begin, end)):
            return None
        return replace(self, offset=tuple(begin), size=tuple(e - b for b, e in zip(begin, end)))

    def slices_within(self, outer: "TensorShard | None" = None) -> tuple[slice, ...]:
        """The index of this box in a tensor that holds the shard `outer`; by default in the whole tensor."""
        base = outer.offset if outer else (0,) * len(self.full_shape)
        return tuple(slice(o - b, o - b + s) for o, b, s in zip(self.offset, base, self.size))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, stop) in each dim."""
        return tuple((o, o + s) for o, s in zip(self.offset, self.size))

    @property
    def file_key(self) -> str:
        """Its key in a safetensors file: `w` for all of w, else with its ranges, as in `w[0:3, 4:8]`."""
        if self.size == self.full_shape:
            return self.name
        return f"{self.name}[{', '.join(f'{start}:{stop}' for start, stop in self.ranges)}]"


def _linear(name, outputs, inputs, config):
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if config.has_bias(name.split(".")[1]) else weight


def _norm(name, config):
    weight = {f"{name}.weight": (config.width,)}
    return weight | {f"{name}.bias": (config.width,)} if config.architecture.norm_type == "layer" else weight
