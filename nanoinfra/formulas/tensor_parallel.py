"""Tensor parallelism (TP) over t ranks: the shard of each parameter that a rank holds, and its traffic.

Column-parallel linears (q, k, v, gate, up) are sharded along their outputs, row-parallel ones (o, down) along
their inputs, embedding and head along the vocabulary; the rest is replicated. Attention is sharded by whole
heads: with fewer KV heads than ranks, t/KV neighbouring ranks hold a replica of the same one. In an uneven
split each rank has ceil(d/t) rows, the last ranks fewer. A layer sends 8 (t-1)/t BTC numbers a micro-batch.
Shoeybi et al. 2019 (Megatron-LM), section 3; sequence parallelism: Korthikanti et al. 2022, section 4.2.2.
"""
from dataclasses import replace
from math import ceil, prod

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import RECOMPUTED_FLOP_TERMS
from nanoinfra.formulas.parameters import TensorShard, parameter_shapes

_COLUMN_PARALLEL = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "embed", "head")
_ROW_PARALLEL = ("attn.o.weight", "mlp.down.weight")
_QK_NORMS = (".attn.q_norm.weight", ".attn.k_norm.weight")
SEQUENCE_PARALLEL_MODES = ("none", "keep", "gather")     # what backward does for an input gathered along T


def check_tp_fits_model(config: ModelConfig, tp: int) -> None:
    """Raise ValueError, with a tp that works, unless `tp` ranks can split the model's heads and matrices."""
    misfit = _misfit(config, tp)
    if misfit:
        works = max(n for n in range(1, tp) if not _misfit(config, n))
        raise ValueError(f"tp={tp} {misfit}; try --tp {works}")


def _check_sp(sp: str) -> None:
    """Raise ValueError unless `sp` is one of `SEQUENCE_PARALLEL_MODES`."""
    if sp not in SEQUENCE_PARALLEL_MODES:
        raise ValueError(f"sp {sp!r} is not one of {', '.join(SEQUENCE_PARALLEL_MODES)}")


def padded_seq_len(seq: int, tp: int, sp: str) -> int:
    """The sequence length that sequence parallelism pads to, so that `tp` ranks have equally many tokens."""
    _check_sp(sp)
    return seq if sp == "none" else tp * ceil(seq / tp)


def tp_shards(config: ModelConfig, tp: int, rank: int) -> dict[str, TensorShard]:
    """The shard of every parameter, by name, that `rank` of `tp` ranks holds."""
    found = {}
    for name, shape in parameter_shapes(config).items():
        dim = tp_sharded_dim(name)
        found[name] = TensorShard.of_whole_tensor(name, shape)
        if dim is not None:
            rows = _heads(config, name, tp, rank) or tp_shard_range(shape[dim], tp, rank)
            found[name] = found[name].slice_dim(dim, *rows)
    return found


def tp_sharded_dim(parameter_name: str) -> int | None:
    """The dim along which a parameter is sharded: 0 (outputs), 1 (inputs), or None if it is replicated."""
    if parameter_name.endswith(_ROW_PARALLEL):
        return 1
    module = parameter_name.rpartition(".")[0]
    return 0 if module.endswith(_COLUMN_PARALLEL) else None


def tp_shard_range(size: int, tp: int, rank: int) -> tuple[int, int]:
    """The range [start, stop) of `size` rows that `rank` holds: ceil(size/tp), the last ranks fewer."""
    each = ceil(size / tp)
    return min(size, rank * each), min(size, (rank + 1) * each)


def kv_head_replicas(config: ModelConfig, tp: int) -> int:
    """The number of neighbouring ranks that hold a replica of the same KV head."""
    return max(1, tp // config.kv_heads)


def tp_rank_config(config: ModelConfig, tp: int) -> ModelConfig:
    """The heads, hidden units and vocabulary of one TP rank, as a ModelConfig.

    They are rank 0's, and no rank has larger ones. Width, head_dim and layers are the same on every rank.
    """
    check_tp_fits_model(config, tp)
    return replace(config, heads=config.heads // tp, kv_heads=max(1, config.kv_heads // tp),
                   hidden=ceil(config.hidden / tp), vocab=ceil(config.vocab / tp))


def tp_collectives_per_step(config: ModelConfig, tp: int, batch: int, seq: int, micro_batches: int = 1,
                            dtype_bytes: int = 4, grad_bytes: int = 4, sp: str = "none",
                            recompute: str = "none") -> dict[tuple[str, str], tuple[int, int]]:
    """{(op, tag): (calls, payload bytes)} of the TP collectives of one step on one of `tp` ranks, exactly.

    A micro-batch is `batch` sequences of `seq` tokens. Tags: "layers" for the collectives of the blocks,
    "ends" for those of embedding and head, "loss" for three numbers a token in float32 at least (maximum, sum
    of exponentials, the target's logit), "tp grads" for partial gradients, summed once a step in
    `grad_bytes`. With `sp` the hidden states travel as t ceil(T/t) tokens. The grad-norm's scalars are not
    counted.
    """
    check_tp_fits_model(config, tp)
    if tp == 1:
        return {}
    hidden_states = _hidden_states_bytes(config, tp, batch, seq, dtype_bytes, sp)
    a, layer = micro_batches, tp_collectives_per_layer(sp, recompute)
    calls = {(op, "layers"): a * config.layers * n for op, n in layer.items()}
    calls |= {(op, "ends"): a * n for op, n in _end_calls(sp).items()}
    sent = {key: (n, n * hidden_states) for key, n in calls.items()}
    sent["all_reduce", "loss"] = (3 * a, 3 * a * batch * seq * max(4, dtype_bytes))
    sums = tp_grad_all_reduce_sizes(config, tp, sp)
    return sent | {("all_reduce", "tp grads"): (len(sums), sum(sums) * grad_bytes)} if sums else sent


def tp_collectives_per_layer(sp: str = "none", recompute: str = "none") -> dict[str, int]:
    """The number of TP collectives of one layer and micro-batch, each on the hidden states (B, T, C).

    Attention and MLP have one in forward and one in backward: an all-reduce (g and f in Megatron-LM), or with
    `sp` an all-gather and a reduce-scatter. "full" recompute runs forward's again; "selective" recomputes
    between f and g, without collectives. With "gather", backward gathers the linears' inputs again.
    """
    _check_sp(sp)
    if recompute not in RECOMPUTED_FLOP_TERMS:
        raise ValueError(f"recompute {recompute!r} is not one of {', '.join(RECOMPUTED_FLOP_TERMS)}")
    passes = 3 if recompute == "full" else 2
    if sp == "none":
        return {"all_reduce": 2 * passes}
    return {"all_gather": 2 * passes + (2 if sp == "gather" else 0), "reduce_scatter": 2 * passes}


def tp_grad_all_reduce_sizes(config: ModelConfig, tp: int, sp: str = "none") -> list[int]:
    """The numbers in each of the TP all-reduces of gradients that end a step; empty ones are left out.

    The first, over all `tp` ranks, has the gradients for which `has_partial_grad` holds, in one tensor. The
    second, over the `kv_head_replicas` ranks that share a KV head, has the gradients of k and v.
    """
    held = {name: prod(shard.size) for name, shard in tp_shards(config, tp, 0).items()}
    summed = sum(n for name, n in held.items() if tp > 1 and has_partial_grad(name, sp))
    shared = sum(n for name, n in held.items() if ".attn.k." in name or ".attn.v." in name)
    return [n for n in (summed, shared if kv_head_replicas(config, tp) > 1 else 0) if n]


def has_partial_grad(parameter_name: str, sp: str = "none") -> bool:
    """Whether each rank's gradient of a parameter is a partial sum, to be all-reduced over all TP ranks.

    This holds for the norms of q and k, because each rank has other heads. With sequence parallelism each
    rank has other tokens too, so it holds for every replicated parameter: norms, positions, biases of o and
    down.
    """
    return parameter_name.endswith(_QK_NORMS) or (sp != "none" and tp_sharded_dim(parameter_name) is None)


def _hidden_states_bytes(config, tp, batch, seq, dtype_bytes, sp):
    """Payload bytes of a collective on the hidden states of one micro-batch."""
    return batch * padded_seq_len(seq, tp, sp) * config.width * dtype_bytes


def _end_calls(sp):
    """Collectives of embedding and head for one micro-batch, as for a layer's row and column linears."""
    if sp == "none":
        return {"all_reduce": 2}
    return {"all_gather": 3 if sp == "gather" else 2, "reduce_scatter": 2}


def _heads(config, name, tp, rank):
    """The rows (for o the columns) of this rank's heads; None for a parameter without heads."""
    if ".attn." not in name:
        return None
    n, place = config.heads // tp, rank
    if ".attn.k." in name or ".attn.v." in name:
        n, place = max(1, config.kv_heads // tp), rank // kv_head_replicas(config, tp)
    return place * n * config.head_dim, (place + 1) * n * config.head_dim


def _misfit(config, tp):
    """The reason why `tp` ranks cannot split the model, or None."""
    H, KV = config.heads, config.kv_heads
    if H % tp or (KV % tp and tp % KV):
        return (f"cannot share {H} query and {KV} KV heads: it must divide {H}, and divide {KV} or be a "
                f"multiple of it")
    for what, size in (("vocabulary", config.vocab), ("MLP's width", config.hidden)):
        if ceil(size / tp) * (tp - 1) >= size:
            return f"leaves a rank without a part of the {what} of {size}"
