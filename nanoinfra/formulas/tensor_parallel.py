"""Tensor parallelism over t ranks: which part of each parameter a rank holds, and what a step sends.

Column-parallel matrices (q, k, v, gate, up) are cut along their outputs, row-parallel ones (o, down) along
their inputs, embedding and head along the vocabulary; the rest stays whole. Heads are cut as heads: where
there are fewer KV heads than ranks, t/KV neighbours hold the same one. A cut that does not come out even
gives the last rank less: ceil(d/t) places a rank. Wire: 8 (t-1)/t BTC numbers a layer and micro-batch.
Shoeybi et al. 2019 (Megatron-LM), section 3; sequence-parallel: Korthikanti et al. 2022, section 4.2.2.
"""
from dataclasses import replace
from math import ceil, prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.collectives import ring_bytes
from nanoinfra.formulas.flops import RECOMPUTED
from nanoinfra.formulas.parameters import shapes

Box = tuple[tuple[int, int], ...]            # (start, stop) in each dim
OUTPUTS = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "embed", "head")
INPUTS = ("attn.o.weight", "mlp.down.weight")
HEAD_NORMS = (".attn.q_norm.weight", ".attn.k_norm.weight")
SEQUENCE_PARALLEL_MODES = ("none", "keep", "gather")     # what backward does for an input gathered along T


def check_heads(config: ModelConfig, t: int) -> None:
    """Raise ValueError, with a t that works, unless `t` ranks can share the model's heads and vocabulary."""
    misfit = _misfit(config, t)
    if misfit:
        works = max(n for n in range(1, t) if not _misfit(config, n))
        raise ValueError(f"tp={t} {misfit}; try --tp {works}")


def check_sp(sp: str) -> None:
    """Raise ValueError unless `sp` is one of `SP`."""
    if sp not in SEQUENCE_PARALLEL_MODES:
        raise ValueError(f"sp {sp!r} is not one of {', '.join(SEQUENCE_PARALLEL_MODES)}")


def padded_seq(seq: int, t: int, sp: str) -> int:
    """Tokens of a sequence with those of zeros that make `t` equal stretches of it, where `sp` cuts it."""
    check_sp(sp)
    return seq if sp == "none" else t * ceil(seq / t)


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


def extent(box: Box) -> tuple[int, ...]:
    """The shape of what lies in `box`."""
    return tuple(stop - start for start, stop in box)


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


def part(config: ModelConfig, t: int) -> ModelConfig:
    """The sizes that rank 0 of `t` computes with, no rank has larger ones: C, K and layers are everyone's."""
    check_heads(config, t)
    return replace(config, heads=config.heads // t, kv_heads=max(1, config.kv_heads // t),
                   hidden=ceil(config.hidden / t), vocab=ceil(config.vocab / t))


def tensor_sent(config: ModelConfig, t: int, batch: int, seq: int, micro_batches: int = 1,
                dtype_bytes: int = 4, grad_bytes: int = 4, sp: str = "none",
                recompute: str = "none") -> dict[tuple[str, str], tuple[int, int]]:
    """{(op, tag): (calls, payload bytes)} of one step on one of `t` ranks, exactly; norms' scalars apart.

    A micro-batch is `batch` sequences of `seq` tokens. Tags: "layers", the blocks' collectives; "ends", those
    of embedding and head; "loss", three numbers a token, in float32 at least (maximum, sum of exponentials,
    the target's logit); "tp grads", gradients that are parts of a sum, once a step, in `grad_bytes`. With
    `sp` the residual stream travels as t ceil(T/t) tokens.
    """
    check_heads(config, t)
    if t == 1:
        return {}
    region = _region(config, t, batch, seq, dtype_bytes, sp)
    a, layer = micro_batches, layer_calls(sp, recompute)
    calls = {(op, "layers"): a * config.layers * n for op, n in layer.items()}
    calls |= {(op, "ends"): a * n for op, n in _end_calls(sp).items()}
    sent = {key: (n, n * region) for key, n in calls.items()}
    sent["all_reduce", "loss"] = (3 * a, 3 * a * batch * seq * max(4, dtype_bytes))
    sums = grad_sums(config, t, sp)
    return sent | {("all_reduce", "tp grads"): (len(sums), sum(sums) * grad_bytes)} if sums else sent


def layer_calls(sp: str = "none", recompute: str = "none") -> dict[str, int]:
    """Collectives of one layer and micro-batch, each on the whole residual stream.

    Attention and MLP have one each way: all-reduce (g forward, f backward), or with `sp` an all-gather and a
    reduce-scatter both ways. "full" recompute runs the forward's again, to the end; "selective" recomputes
    between f and g. "gather" has backward gather anew what a weight's gradient is made of.
    """
    check_sp(sp)
    if recompute not in RECOMPUTED:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED)}")
    passes = 3 if recompute == "full" else 2
    if sp == "none":
        return {"all_reduce": 2 * passes}
    return {"all_gather": 2 * passes + (2 if sp == "gather" else 0), "reduce_scatter": 2 * passes}


def layer_wire_bytes(config: ModelConfig, t: int, batch: int, seq: int, dtype_bytes: int = 4,
                     sp: str = "none", recompute: str = "none") -> float:
    """Bytes that a rank sends in rings for one layer and micro-batch.

    8 (t-1)/t BTC numbers without sp and with "keep", 10 (t-1)/t with "gather"; full recompute 4 (t-1)/t more.
    """
    region = _region(config, t, batch, seq, dtype_bytes, sp)
    return sum(n * ring_bytes(op, region, t) for op, n in layer_calls(sp, recompute).items())


def grad_sums(config: ModelConfig, t: int, sp: str = "none") -> list[int]:
    """Numbers in each all-reduce of gradients once a step, those of no number left out.

    First, over all `t` ranks, what `partial` names, in one piece; second, over the `copies` ranks that share
    a KV head, the gradients of their rows of k and v.
    """
    held = {name: prod(stop - start for start, stop in box) for name, box in boxes(config, t, 0).items()}
    summed = sum(n for name, n in held.items() if t > 1 and partial(name, sp))
    shared = sum(n for name, n in held.items() if ".attn.k." in name or ".attn.v." in name)
    return [n for n in (summed, shared if copies(config, t) > 1 else 0) if n]


def partial(name: str, sp: str = "none") -> bool:
    """Is a rank's gradient of parameter `name` a part of a sum over all ranks?

    Those of the norms of q and k are, each rank having its own heads; with sp that of every parameter that
    stays whole, as a rank's tokens are its own too: norms, positions, biases of o and down.
    """
    return name.endswith(HEAD_NORMS) or (sp != "none" and cut_dim(name) is None)


def _region(config, t, batch, seq, dtype_bytes, sp):
    """Bytes of the residual stream of a micro-batch, as collectives see it."""
    return batch * padded_seq(seq, t, sp) * config.width * dtype_bytes


def _end_calls(sp):
    """Of one micro-batch: the embedding is left as attention is, the head read as q, k and v are."""
    if sp == "none":
        return {"all_reduce": 2}
    return {"all_gather": 3 if sp == "gather" else 2, "reduce_scatter": 2}


def _heads(config, name, t, rank):
    """The rows, or for o the columns, of this rank's heads; None for what has no heads."""
    if ".attn." not in name:
        return None
    n, place = config.heads // t, rank
    if ".attn.k." in name or ".attn.v." in name:
        n, place = max(1, config.kv_heads // t), rank // copies(config, t)
    return place * n * config.head_dim, (place + 1) * n * config.head_dim


def _misfit(config, t):
    """What keeps `t` ranks from sharing the model, or None."""
    H, KV = config.heads, config.kv_heads
    if H % t or (KV % t and t % KV):
        return (f"cannot share {H} query and {KV} KV heads: it must divide {H}, and divide {KV} or be a "
                f"multiple of it")
    for what, size in (("vocabulary", config.vocab), ("MLP's width", config.hidden)):
        if ceil(size / t) * (t - 1) >= size:
            return f"leaves a rank without a part of the {what} of {size}"
