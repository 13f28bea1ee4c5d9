"""Which part of each parameter a tensor-parallel rank holds, of t on the axis.

Column-parallel matrices (q, k, v, gate, up) are cut along their outputs, row-parallel ones (o, down) along
their inputs, embedding and head along the vocabulary; the rest stays whole. Heads are cut as heads: where
there are fewer KV heads than ranks, t/KV neighbours hold the same one. A cut that does not come out even
gives the last rank less: ceil(d/t) places a rank.  Shoeybi et al. 2019 (Megatron-LM), section 3.
"""
from math import ceil, gcd

from nanoinfra.formulas.params import shapes
from nanoinfra.formulas.shape import ModelConfig

Box = tuple[tuple[int, int], ...]            # (start, stop) in each dim
OUTPUTS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "embed", "head")
INPUTS = ("attn.o.weight", "mlp.down.weight")


def check_heads(config: ModelConfig, t: int) -> None:
    """Raise ValueError, with a t that works, unless `t` ranks can share the model's heads and vocabulary."""
    H, KV = config.heads, config.kv_heads
    if not _fits(H, KV, t):
        works = max(n for n in range(1, t) if _fits(H, KV, n))
        raise ValueError(f"tp={t} cannot share {H} query and {KV} KV heads: it must divide {H}, and divide "
                         f"{KV} or be a multiple of it; try --tp {works}")
    for what, size in (("vocabulary", config.vocab), ("MLP's width", config.hidden)):
        if ceil(size / t) * (t - 1) >= size:
            raise ValueError(f"tp={t} leaves a rank without a part of the {what} of {size}; "
                             f"try --tp {gcd(H, KV)}")


def box(config: ModelConfig, name: str, t: int, rank: int) -> Box:
    """The part of parameter `name` that `rank` of `t` holds."""
    return boxes(config, t, rank)[name]


def boxes(config: ModelConfig, t: int, rank: int) -> dict[str, Box]:
    """The part of every parameter, by name, that `rank` of `t` holds."""
    found = {}
    for name, shape in shapes(config).items():
        dim = cut_dim(name)
        whole = [(0, size) for size in shape]
        if dim is not None:
            whole[dim] = _heads(config, name, t, rank) or stretch(shape[dim], t, rank)
        found[name] = tuple(whole)
    return found


def cut_dim(name: str) -> int | None:
    """The dim along which parameter `name` is cut, or None: 0 is outputs, 1 inputs."""
    if name.endswith(INPUTS):
        return 1
    module = name.rpartition(".")[0]
    return 0 if module.endswith(OUTPUTS) else None


def stretch(size: int, t: int, rank: int) -> tuple[int, int]:
    """Places [start, stop) of `size` that `rank` holds: ceil(size/t), the last ranks less."""
    each = ceil(size / t)
    return min(size, rank * each), min(size, (rank + 1) * each)


def copies(config: ModelConfig, t: int) -> int:
    """How many neighbouring ranks hold the same KV head."""
    return max(1, t // config.kv_heads)


def _heads(config, name, t, rank):
    """The rows, or for o the columns, of this rank's heads; None for what has no heads."""
    if ".attn." not in name:
        return None
    n, place = config.heads // t, rank
    if ".attn.k." in name or ".attn.v." in name:
        n, place = max(1, config.kv_heads // t), rank // copies(config, t)
    return place * n * config.head_dim, (place + 1) * n * config.head_dim


def _fits(H, KV, t):
    return H % t == 0 and (KV % t == 0 or t % KV == 0)
