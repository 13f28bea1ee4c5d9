"""ZeRO: the bytes that each of n ranks holds and sends, exactly, by stage.

A parameter of d0 rows has n shards of ceil(d0/n) rows; the last shards are padded with zeros, which are sent
too. A tied weight is used twice: its gradient is reduced twice, and stage 3 gathers it for each use.
The paper's limits: 2 Psi, (a+1) Psi, 3 a Psi elements sent in a step of a micro-batches; 16 Psi bytes become
4 Psi + 12 Psi/n, 2 Psi + 14 Psi/n, 16 Psi/n. Our stage 3 casts the weights from their float32 masters when it
gathers them and keeps no other copy: 14 Psi/n. Rajbhandari et al. 2020, sections 5 and 7.
"""
from collections.abc import Iterable
from math import ceil, prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.model_states import DTYPE_BYTES, OPTIMIZER_STATE_NAMES
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.tensor_parallel import tp_shards

_BUCKET_BYTES = 25 << 20                      # gradients, or weights, of one collective


def zero_padded_numel(shape: tuple[int, ...], ranks: int) -> int:
    """Elements of a parameter of `shape`, padded with zero rows so that `ranks` ranks get equal shards."""
    rows, *rest = shape or (1,)
    return ranks * ceil(rows / ranks) * prod(rest)


def zero_model_state_bytes(config: ModelConfig, ranks: int, stage: int, precision: str = "float32",
                           optimizer: str = "adamw", grad_bytes: int | None = None) -> dict[str, int]:
    """Bytes of model states that a rank holds, by kind, when all gradients are there; without buffers.

    Stage 0 shards nothing. At stage 1 gradients are not sharded before the last micro-batch's backward.
    """
    used = [shape for _, shape in _named_uses(config)]
    held = parameter_shapes(config).values()
    return zero_model_state_bytes_of_shapes(held, used, ranks, stage, precision, optimizer, grad_bytes)


def zero_model_state_bytes_of_shapes(held: Iterable[tuple[int, ...]], used: Iterable[tuple[int, ...]],
                                     ranks: int, stage: int, precision: str = "float32",
                                     optimizer: str = "adamw",
                                     grad_bytes: int | None = None) -> dict[str, int]:
    """`zero_model_state_bytes` of given shapes: `held` has one a parameter, `used` one for each use of it."""
    own = DTYPE_BYTES[precision]
    wide, grad = max(4, own), own if grad_bytes is None else grad_bytes
    whole, uses = (sum(zero_padded_numel(shape, ranks) for shape in some) for some in (held, used))
    if stage == 0:
        whole = uses = sum(map(prod, held))
    shard = whole // ranks if stage else whole
    weights = whole if stage < 3 else shard if own == wide else 0
    states = {"weights": own * weights, "gradients": grad * (uses if stage < 2 else uses // ranks)}
    if own < 4:
        states["master"] = 4 * shard
    return states | {kind: wide * shard for kind in OPTIMIZER_STATE_NAMES[optimizer]}


def zero_buffer_bytes(config: ModelConfig, ranks: int, stage: int, precision: str = "float32",
                      grad_bytes: int | None = None, bucket_bytes: int = _BUCKET_BYTES, tp: int = 1) -> int:
    """The most bytes of communication buffers at a time, on the first of `tp` ranks.

    Stages 1 and 2 have two buckets of gradients (or twice the largest parameter); later, when no gradient is
    in flight, two buckets of gathered weights. Stage 3 has the gradients and the weights of two units.
    """
    own = DTYPE_BYTES[precision]
    grad = own if grad_bytes is None else grad_bytes
    if stage == 3:
        units = zero3_unit_shapes(config, tp)
        largest = max(sum(zero_padded_numel(shape, ranks) for shape in unit) for unit in units)
        return 2 * largest * (own + grad)
    largest = max(zero_padded_numel(shape, ranks) for _, shape in _named_uses(config, tp))
    return 2 * max(bucket_bytes, largest * max(own, grad))


def zero_payload_bytes(config: ModelConfig, ranks: int, stage: int, micro_batches: int = 1,
                       precision: str = "float32", grad_bytes: int | None = None) -> dict[str, int]:
    """Payload bytes of one step by collective; stage 0 all-reduces each gradient once."""
    own = DTYPE_BYTES[precision]
    grad, a = own if grad_bytes is None else grad_bytes, micro_batches
    whole, used = sum(_sizes(config, ranks)), sum(_uses(config, ranks))
    if stage == 0:
        return {"all_reduce": grad * sum(_sizes(config, 1))}
    return {"reduce_scatter": grad * used * (1 if stage == 1 else a),
            "all_gather": own * (whole if stage < 3 else 2 * a * used)}


def zero_collective_calls(config: ModelConfig, ranks: int, stage: int, micro_batches: int = 1,
                          precision: str = "float32", grad_bytes: int | None = None,
                          bucket_bytes: int = _BUCKET_BYTES, buffers_per_bucket: int = 2) -> dict[str, int]:
    """The number of collectives of one step at stage 1 to 3, by collective.

    A gradient bucket in flight takes `buffers_per_bucket` buffers (gloo 2, NCCL 1) and one more bucket fills,
    all within two `bucket_bytes`; buckets fill from the last parameter to the first. Weights are gathered in
    groups of `bucket_bytes`, at stage 3 by units.
    """
    own, a = DTYPE_BYTES[precision], micro_batches
    units = zero3_unit_shapes(config)
    grad = own if grad_bytes is None else grad_bytes
    if stage == 3:
        bucket_bytes = grad * max(sum(zero_padded_numel(shape, ranks) for shape in unit) for unit in units)
    room = 2 * bucket_bytes // (1 + buffers_per_bucket)
    buckets = _groups([grad * size for size in _uses(config, ranks)[::-1]], room)
    weight_groups = _groups([own * size for size in _sizes(config, ranks)], bucket_bytes)
    gathers = 2 * a * len(units) if stage == 3 else weight_groups
    return {"reduce_scatter": buckets * (1 if stage == 1 else a), "all_gather": gathers}


def zero3_unit_shapes(config: ModelConfig, tp: int = 1) -> list[list[tuple[int, ...]]]:
    """The parameter shapes of each unit that stage 3 gathers at once, on the first of `tp` ranks.

    The units are the embeddings, each block, and the final norm with the head.
    """
    found, unit_of = {}, dict.fromkeys(("embed", "positions", "embed_norm"), "first")
    unit_of |= {"norm": "last", "head": "last"}
    for name, shape in _named_uses(config, tp):
        top, layer, *_ = name.split(".")
        found.setdefault(unit_of.get(top, layer), []).append(shape)
    return list(found.values())


def _named_uses(config, tp=1):
    named = [(name, shard.size) for name, shard in tp_shards(config, tp, 0).items()]
    return named + [("head.weight", named[0][1])] if config.tied else named      # the embedding's, again


def _uses(config, ranks):
    return [zero_padded_numel(shape, ranks) for _, shape in _named_uses(config)]


def _sizes(config, ranks):
    return [zero_padded_numel(shape, ranks) for shape in parameter_shapes(config).values()]


def _groups(sizes: Iterable[int], limit: int) -> int:
    """The number of groups of at most `limit` that `sizes` make in this order; a larger one is alone."""
    count, held = 0, limit + 1
    for size in sizes:
        if held + size > limit:
            count, held = count + 1, 0
        held += size
    return count
