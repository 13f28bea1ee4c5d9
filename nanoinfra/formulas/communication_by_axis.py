"""3D parallelism: the parameters and the bytes sent in a step of one rank of a pp x dp x tp mesh, by axis.

tp: 4 L/p + 1 all-reduces of B T C numbers a micro-batch (the one is the embedding's or the head's), three
numbers a token for the loss. pp: B T C numbers a micro-batch and border of the stage. dp: once a step all
gradients that the rank holds, about Psi/(p t). tied: V C/t numbers, summed over first and last stage.
Without sequence parallelism and ZeRO. Narayanan et al. 2021 (PTD-P), section 3.
p stages, d data ranks, t tensor ranks; m micro-batches of B sequences of T tokens; V vocabulary, C width.
"""
from math import prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.pipeline import split_layers_into_chunks, stage_message_bytes
from nanoinfra.formulas.tensor_parallel import (
    check_tp_fits_model,
    tp_collectives_per_layer,
    tp_grad_all_reduce_sizes,
    tp_shards,
)

TIED_WEIGHT_NAME = "embed.weight"


def rank_parameter_counts(config: ModelConfig, pp: int, tp: int, stage: int = 0,
                          rank: int = 0) -> dict[str, int]:
    """{parameter: count} of the numbers that TP rank `rank` of a pipeline stage holds.

    Raises ValueError as `step_bytes_by_axis` does.
    """
    return {name: prod(shape) for name, shape in rank_parameter_shapes(config, pp, tp, stage, rank).items()}


def rank_parameter_shapes(config: ModelConfig, pp: int, tp: int, stage: int = 0, rank: int = 0,
                          v: int = 1) -> dict[str, tuple[int, ...]]:
    """{parameter: shape of its shard} that TP rank `rank` of a stage of `v` chunks holds."""
    check_tp_fits_model(config, tp)
    layers = {f"blocks.{i}" for start, stop in stage_chunk_layers(config, pp, stage, v)
              for i in range(start, stop)}
    first = ("embed", "positions", "embed_norm") if stage == 0 else ()
    last = ("norm", "head", *["embed"] * config.tied) if stage == pp - 1 else ()

    def is_held(name):
        top, layer, *_ = name.split(".")
        return f"{top}.{layer}" in layers or top in (*first, *last)
    return {name: shard.size for name, shard in tp_shards(config, tp, rank).items() if is_held(name)}


def stage_chunk_layers(config: ModelConfig, pp: int, stage: int, v: int = 1) -> list[tuple[int, int]]:
    """(first layer, one past the last) of each of a stage's `v` chunks: every p-th chunk of the model."""
    return split_layers_into_chunks(config, pp * v, config.context)[stage::pp]


def step_bytes_by_axis(config: ModelConfig, pp: int, dp: int, tp: int, batch: int, seq: int,
                       micro_batches: int, dtype_bytes: int, stage: int = 0, rank: int = 0,
                       recompute: str = "none") -> dict[str, int]:
    """{axis: payload bytes} that TP rank `rank` of pipeline stage `stage` sends in one step; without scalars.

    `micro_batches` is the number of one data-parallel rank, each of `batch` sequences; hidden states and
    gradients have `dtype_bytes` bytes a number. Raises ValueError where tp ranks cannot split the heads, or
    pp stages the layers.
    """
    numbers = rank_parameter_counts(config, pp, tp, stage, rank)
    start, stop = split_layers_into_chunks(config, pp, config.context)[stage]
    first, last = stage == 0, stage == pp - 1
    hidden_states = stage_message_bytes(config, batch, seq, dtype_bytes)
    calls = tp_collectives_per_layer(recompute=recompute)["all_reduce"] * (stop - start) + first + last
    loss = 3 * batch * seq * max(4, dtype_bytes) * last                  # maximum, sum, the target's logit
    partial_grads = dtype_bytes * sum(tp_grad_all_reduce_sizes(config, tp)) * (stop - start) // config.layers
    return {"tp": (micro_batches * (calls * hidden_states + loss) + partial_grads) * (tp > 1),
            "pp": micro_batches * hidden_states * (2 - first - last),
            "dp": dtype_bytes * sum(numbers.values()) * (dp > 1),
            "tied": dtype_bytes * numbers.get(TIED_WEIGHT_NAME, 0) * (config.tied and pp > 1)}
