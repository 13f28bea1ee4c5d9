"""What ZeRO holds and sends, exactly, from the shapes of a decoder, the ranks n and the stage.

A parameter of d0 rows is cut into n shards of ceil(d0/n) rows, the last ones filled up with zeros, which
travel too. A tied weight is used twice: its gradient leaves twice, and stage 3 gathers it for each use.
The limit is the paper's: 2 Psi, (a+1) Psi, 3 a Psi elements a step, a micro-batches; 16 Psi bytes become
4 Psi + 12 Psi/n, 2 Psi + 14 Psi/n, 16 Psi/n. Here stage 3 casts weights from their float32 masters whenever
it gathers them, and keeps no other copy: 14 Psi/n. Rajbhandari et al. 2020, sections 5 and 7.
"""
from collections.abc import Iterable
from math import ceil, prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.model_states import BYTES, OPTIMIZER_STATES
from nanoinfra.formulas.parameters import shapes
from nanoinfra.formulas.tensor_parallel import boxes, extent

BUCKET_BYTES = 25 << 20                      # of gradients or weights that travel together


def padded(shape: tuple[int, ...], n: int) -> int:
    """Elements of a parameter of `shape` with the zero rows that make n equal shards of it."""
    rows, *rest = shape or (1,)
    return n * ceil(rows / n) * prod(rest)


def zero_bytes(config: ModelConfig, n: int, stage: int, precision: str = "float32", optimizer: str = "adamw",
               grad_bytes: int | None = None) -> dict[str, int]:
    """Bytes of model states a rank holds, by kind, all gradients in hand; what is on its way is apart.

    Stage 0 keeps everything whole. At stage 1 gradients are whole until the last micro-batch's backward.
    """
    used = [shape for _, shape in _named_uses(config)]
    return states_bytes(shapes(config).values(), used, n, stage, precision, optimizer, grad_bytes)


def states_bytes(held: Iterable[tuple[int, ...]], used: Iterable[tuple[int, ...]], n: int, stage: int,
                 precision: str = "float32", optimizer: str = "adamw",
                 grad_bytes: int | None = None) -> dict[str, int]:
    """`zero_bytes` of a rank that without ZeRO has parameters of shapes `held`; `used`: one for each use."""
    own = BYTES[precision]
    wide, grad = max(4, own), own if grad_bytes is None else grad_bytes
    whole, uses = (sum(padded(shape, n) for shape in some) for some in (held, used))
    if stage == 0:
        whole = uses = sum(map(prod, held))
    cut = whole // n if stage else whole
    weights = whole if stage < 3 else cut if own == wide else 0
    states = {"weights": own * weights, "gradients": grad * (uses if stage < 2 else uses // n)}
    if own < 4:
        states["master"] = 4 * cut
    return states | {kind: wide * cut for kind in OPTIMIZER_STATES[optimizer]}


def zero_buffers(config: ModelConfig, n: int, stage: int, precision: str = "float32",
                 grad_bytes: int | None = None, bucket_bytes: int = BUCKET_BYTES, tp: int = 1) -> int:
    """The most bytes on their way at a time, beside `zero_bytes`, on the first of `tp` ranks.

    Gradients: two buckets (or twice the largest parameter); at stage 3 two units', and two units of weights.
    Stages 1 and 2 gather weights when no gradient is under way, also by two buckets.
    """
    own = BYTES[precision]
    grad = own if grad_bytes is None else grad_bytes
    if stage == 3:
        largest = max(sum(padded(shape, n) for shape in unit) for unit in units(config, tp))
        return 2 * largest * (own + grad)
    largest = max(padded(shape, n) for _, shape in _named_uses(config, tp)) * max(own, grad)
    return 2 * max(bucket_bytes, largest)


def zero_payload(config: ModelConfig, n: int, stage: int, micro_batches: int = 1, precision: str = "float32",
                 grad_bytes: int | None = None) -> dict[str, int]:
    """Payload bytes of a step by collective. At stage 0 one all-reduce of each gradient."""
    own = BYTES[precision]
    grad, a = own if grad_bytes is None else grad_bytes, micro_batches
    whole, used = sum(_sizes(config, n)), sum(_uses(config, n))
    if stage == 0:
        return {"all_reduce": grad * sum(_sizes(config, 1))}
    return {"reduce_scatter": grad * used * (1 if stage == 1 else a),
            "all_gather": own * (whole if stage < 3 else 2 * a * used)}


def zero_calls(config: ModelConfig, n: int, stage: int, micro_batches: int = 1, precision: str = "float32",
               grad_bytes: int | None = None, bucket_bytes: int = BUCKET_BYTES,
               copies: int = 2) -> dict[str, int]:
    """Collectives of a step of stage 1 to 3.

    A bucket of gradients under way exists `copies` times (gloo 2, NCCL 1) and one more fills, within the room
    of two `bucket_bytes`; buckets are filled last parameter first. Weights are gathered by `bucket_bytes`, at
    stage 3 by units.
    """
    own, a, groups = BYTES[precision], micro_batches, units(config)
    grad = own if grad_bytes is None else grad_bytes
    if stage == 3:
        bucket_bytes = grad * max(sum(padded(shape, n) for shape in unit) for unit in groups)
    buckets = _groups([grad * size for size in _uses(config, n)[::-1]], 2 * bucket_bytes // (1 + copies))
    kept = _groups([own * size for size in _sizes(config, n)], bucket_bytes)
    gathers = 2 * a * len(groups) if stage == 3 else kept
    return {"reduce_scatter": buckets * (1 if stage == 1 else a), "all_gather": gathers}


def units(config: ModelConfig, tp: int = 1) -> list[list[tuple[int, ...]]]:
    """The shapes that stage 3 gathers together: embeddings, each block, the last norm and the head.

    They are those of the first of `tp` ranks.
    """
    found, unit_of = {}, dict.fromkeys(("embed", "positions", "embed_norm"), "first")
    unit_of |= {"norm": "last", "head": "last"}
    for name, shape in _named_uses(config, tp):
        top, layer, *_ = name.split(".")
        found.setdefault(unit_of.get(top, layer), []).append(shape)
    return list(found.values())


def _named_uses(config, tp=1):
    named = [(name, extent(box)) for name, box in boxes(config, tp, 0).items()]
    return named + [("head.weight", named[0][1])] if config.tied else named      # the embedding's, again


def _uses(config, n):
    return [padded(shape, n) for _, shape in _named_uses(config)]


def _sizes(config, n):
    return [padded(shape, n) for shape in shapes(config).values()]


def _groups(sizes: Iterable[int], limit: int) -> int:
    """How many groups of at most `limit` they make, in this order; what is larger goes alone."""
    count, held = 0, limit + 1
    for size in sizes:
        if held + size > limit:
            count, held = count + 1, 0
        held += size
    return count
