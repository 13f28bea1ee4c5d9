"""What a rank of a pp x dp x tp mesh sends in a step, by axis, exactly: each axis sees what the others leave.

    tp    4 L/p + 1 all-reduces of B T C numbers a micro-batch, the one more at either end; the loss's three
    pp    B T C numbers a micro-batch and border of the stage
    dp    once a step all gradients held, about Psi/(p t); the tied weight is held at both ends
    tied  V C/t numbers, summed over both ends
Without sequence parallelism and ZeRO. Narayanan et al. 2021 (PTD-P), section 3.
p stages, d data ranks, t tensor ranks; m micro-batches of B sequences of T tokens; V vocabulary, C width.
"""
from math import prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.pipeline import message_bytes, split
from nanoinfra.formulas.tensor_parallel import boxes, check_heads, extent, grad_sums, layer_calls

TIED = "embed.weight"


def held(config: ModelConfig, p: int, t: int, stage: int = 0, rank: int = 0) -> dict[str, int]:
    """{parameter: numbers of it} that tensor rank `rank` of a stage has. Raises ValueError as `sent` does."""
    return {name: prod(shape) for name, shape in held_shapes(config, p, t, stage, rank).items()}


def held_shapes(config: ModelConfig, p: int, t: int, stage: int = 0, rank: int = 0,
                v: int = 1) -> dict[str, tuple[int, ...]]:
    """{parameter: the shape of its part} that tensor rank `rank` of a stage of `v` chunks has."""
    check_heads(config, t)
    layers = {f"blocks.{i}" for start, stop in chunks(config, p, stage, v) for i in range(start, stop)}
    first = ("embed", "positions", "embed_norm") if stage == 0 else ()
    last = ("norm", "head", *["embed"] * config.tied) if stage == p - 1 else ()

    def here(name):
        top, layer, *_ = name.split(".")
        return f"{top}.{layer}" in layers or top in (*first, *last)
    return {name: extent(box) for name, box in boxes(config, t, rank).items() if here(name)}


def chunks(config: ModelConfig, p: int, stage: int, v: int = 1) -> list[tuple[int, int]]:
    """(first layer, one past the last) of each of a stage's `v` chunks: every p-th of the model's."""
    return split(config, p * v, config.context)[stage::p]


def sent(config: ModelConfig, p: int, d: int, t: int, batch: int, seq: int, micro_batches: int,
         itemsize: int, stage: int = 0, rank: int = 0, recompute: str = "none") -> dict[str, int]:
    """{axis: payload bytes} of one step of tensor rank `rank` of pipeline stage `stage`; scalars apart.

    `micro_batches` are a data rank's, of `batch` sequences; stream and gradients are of `itemsize` bytes a
    number. Raises ValueError where t ranks cannot share the heads, or p stages the layers.
    """
    numbers = held(config, p, t, stage, rank)
    start, stop = split(config, p, config.context)[stage]
    first, last = stage == 0, stage == p - 1
    stream = message_bytes(config, batch, seq, itemsize)
    calls = layer_calls(recompute=recompute)["all_reduce"] * (stop - start) + first + last
    loss = 3 * batch * seq * max(4, itemsize) * last                     # maximum, sum, the target's logit
    parts = itemsize * sum(grad_sums(config, t)) * (stop - start) // config.layers
    return {"tp": (micro_batches * (calls * stream + loss) + parts) * (t > 1),
            "pp": micro_batches * stream * (2 - first - last),
            "dp": itemsize * sum(numbers.values()) * (d > 1),
            "tied": itemsize * numbers.get(TIED, 0) * (config.tied and p > 1)}
