"""Test cases of lesson 10: gradients as each rank of a mesh has them, and those of the whole model.

A small decoder, cut by layers, heads and vocabulary as the real one is, under sequence parallelism; its
gradients are drawn, not computed: each by its logical parameter, its micro-batch and its data rank, a norm's
also by its tensor rank (which sees its own tokens), the tied weight's by its use, embedding or head.
"""
import functools
from zlib import crc32

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.formulas.tensor_parallel import tp_shards

CONFIG = ModelConfig(vocab=12, width=8, layers=4, heads=4, kv_heads=4, head_dim=2, hidden=12, context=8)
MICRO_BATCHES, TIED = 3, "embed.weight"
MESHES = ((2, 2, 2), (4, 2, 1), (2, 1, 4), (1, 4, 2))                          # (pp, dp, tp), of eight ranks


def names(pp: int, stage: int) -> list[str]:
    """The parameters of a stage, in the model's order; of the last one with the tied weight first."""
    start, stop = split_layers_into_chunks(CONFIG, pp, CONFIG.context)[stage]
    layers = {f"blocks.{i}." for i in range(start, stop)}
    ends = [TIED] * (stage in (0, pp - 1)) + ["norm.weight"] * (stage == pp - 1)
    return [name for name in parameter_shapes(CONFIG) if name in ends or name.startswith(tuple(layers))]


def is_norm(name: str) -> bool:
    """Does every tensor rank have all of it?"""
    return "norm" in name


def micro(mesh: Mesh) -> list[dict[str, torch.Tensor]]:
    """This rank's gradients, a dict for each micro-batch."""
    pp, dp, tp = mesh.pp, mesh.dp.rank, mesh.tp
    uses = [use for use, stage in enumerate((0, pp.size - 1)) if stage == pp.rank]
    return [{name: sum(_drawn(name, k, dp, tp.rank, use) for use in (uses if name == TIED else [0]))[
        _place(name, tp.size, tp.rank)].clone() for name in names(pp.size, pp.rank)}
        for k in range(MICRO_BATCHES)]


def total(name: str, sizes: tuple[int, int, int], rank: int, micro=(1,) * MICRO_BATCHES,
          dp: int | None = None, tp: int | None = None, uses=(0, 1)) -> torch.Tensor:
    """The gradient of tensor rank `rank`'s part of parameter `name`, summed over all that has one.

    Slips: `micro` weighs micro-batches; `dp`, `tp` and `uses` are the only ones that count.
    """
    _, n, t = sizes
    data_ranks = range(n) if dp is None else [dp]
    tensor_ranks = [0] if not is_norm(name) else range(t) if tp is None else [tp]
    whole = sum(weight * _drawn(name, k, d, r, use) for k, weight in enumerate(micro) for d in data_ranks
                for r in tensor_ranks for use in (uses if name == TIED else [0]))
    return whole[_place(name, t, rank)]


def slips(name: str, sizes: tuple[int, int, int], at: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """{cause: what the rank at (pp, dp, tp) would have of `name`}."""
    (pp, n, t), (stage, d, rank) = sizes, at
    get = functools.partial(total, name, sizes, rank)
    given, found = "The loss was divided by the step's tokens already", {}
    if is_norm(name):
        found = {"a norm has seen this rank's tokens alone: sum over tp": get(tp=rank),
                 "a norm's parts averaged over tp? They are parts of a sum": get() / t}
    found |= {"the last micro-batch alone: add them up": get(micro=(*(0,) * (MICRO_BATCHES - 1), 1)),
              f"divided by the micro-batches? {given}": get() / MICRO_BATCHES,
              f"divided by the data ranks? {given}": get() / n,
              "this data rank's alone: sum over dp": get(dp=d)}
    if not is_norm(name):
        parts = [total(name, sizes, r) for r in range(t)]
        found["a matrix summed over tp? Every rank has rows or heads of its own"] = sum(parts)
    if name == TIED and pp > 1:
        own = [use for use, end in enumerate((0, pp - 1)) if end == stage]
        found["one end's use alone: sum the tied weight over `ends`"] = get(uses=own)
        found["summed over `ends` twice?"] = 2 * get()
    return found


def norm(sizes: tuple[int, int, int], norms: int = 1, tied: int = 1, stage: int | None = None,
         rank: int | None = None) -> float:
    """The 2-norm of the whole gradient. Slips: times that norms' and the tied weight's squares count; the
    only stage, or tensor rank, that counts."""
    pp, _, t = sizes
    square = 0.0
    for name in parameter_shapes(CONFIG) if stage is None else names(pp, stage):
        if (is_norm(name) and rank) or (name == TIED and stage):
            continue                                                     # counts elsewhere
        times = norms if is_norm(name) else tied if name == TIED else 1
        parts = [0] if is_norm(name) else range(t) if rank is None else [rank]
        square += times * sum(total(name, sizes, r).square().sum().item() for r in parts)
    return square ** 0.5


def norm_slips(sizes: tuple[int, int, int], at: tuple[int, int, int]) -> dict[str, float]:
    """{cause: the number that the rank at (pp, dp, tp) would return}."""
    right, (_, n, t) = norm(sizes), sizes
    found = {"norms' weights are on all tp ranks alike: count them on one": norm(sizes, norms=t),
             "the tied weight is at both ends of the pipe: count it at one": norm(sizes, tied=2),
             "norms count on every tp rank, the tied weight at both ends": norm(sizes, t, 2),
             "all dp ranks hold the same gradient: no sum over dp": right * n ** 0.5,
             "the tied weight counts at neither end": norm(sizes, tied=0),
             "norms count on no rank": norm(sizes, norms=0),
             "the sum of squares, without its root": right ** 2,
             "this stage's alone: sum the squares over pp": norm(sizes, stage=at[0]),
             "this tensor rank's alone: sum the squares over tp": norm(sizes, rank=at[2])}
    return {cause: value for cause, value in found.items() if abs(value / right - 1) > 1e-9}


@functools.lru_cache(maxsize=4096)
def _drawn(name, k, dp, tp, use):
    """One micro-batch's whole gradient; of a matrix the same, whoever of tp computes a part of it."""
    seed = crc32(f"{name} {k} {dp} {tp if is_norm(name) else 0} {use}".encode())
    return torch.randn(parameter_shapes(CONFIG)[name], generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64)


@functools.lru_cache(maxsize=512)
def _place(name, t, rank):
    return tp_shards(CONFIG, t, rank)[name].slices_within()
