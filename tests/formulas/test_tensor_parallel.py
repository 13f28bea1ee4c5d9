from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.collectives import ring_bytes_per_rank
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.tensor_parallel import (
    SEQUENCE_PARALLEL_MODES,
    check_tp_fits_model,
    has_partial_grad,
    kv_head_replicas,
    padded_seq_len,
    tp_collectives_per_layer,
    tp_collectives_per_step,
    tp_grad_all_reduce_sizes,
    tp_rank_config,
    tp_shard_range,
    tp_sharded_dim,
    tp_shards,
)
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from tests.families import KINDS

SMOLLM2 = ModelConfig(100, 36, 2, 9, 3, 4, 26, 64)
SHARED = (".attn.k.", ".attn.v.")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_boxes_of_all_ranks_tile_every_parameter(shared_configs, data):
    """A number of a cut parameter is on one rank, of k and v on `copies` of them, of a whole one on all."""
    config, t = data.draw(shared_configs)
    held = [tp_shards(config, t, rank) for rank in range(t)]
    for name, shape in parameter_shapes(config).items():
        count = torch.zeros(shape, dtype=torch.long)
        for mine in held:
            count[mine[name].slices_within()] += 1
        replicas = kv_head_replicas(config, t) if any(s in name for s in SHARED) else 1
        want = t if tp_sharded_dim(name) is None else replicas
        assert (count == want).all(), name


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_rank_has_the_kv_heads_of_its_queries(shared_configs, data):
    config, t = data.draw(shared_configs)
    group, K = config.heads // config.kv_heads, config.head_dim
    for rank in range(t):
        (first, last), _ = tp_shards(config, t, rank)["blocks.0.attn.q.weight"].ranges
        (start, stop), _ = tp_shards(config, t, rank)["blocks.0.attn.k.weight"].ranges
        assert (start, stop) == (first // K // group * K, ((last // K - 1) // group + 1) * K)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_part_has_the_shapes_of_rank_0_and_no_rank_has_more(shared_configs, data):
    config, t = data.draw(shared_configs)
    held = [[prod(shard.size) for shard in tp_shards(config, t, rank).values()] for rank in range(t)]
    assert held[0] == [prod(shape) for shape in parameter_shapes(tp_rank_config(config, t)).values()]
    assert all(n <= largest for mine in held for n, largest in zip(mine, held[0]))


def test_uneven_cuts_by_hand():
    assert [tp_shard_range(10, 4, rank) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    third = tp_shards(SMOLLM2, 3, 2)
    assert third["blocks.1.mlp.down.weight"].ranges == ((0, 36), (18, 26))
    assert third["embed.weight"].ranges == ((68, 100), (0, 36))
    assert tp_shards(SMOLLM2, 9, 5)["blocks.0.attn.v.weight"].ranges == ((4, 8), (0, 36))     # KV head 1
    assert [padded_seq_len(10, 4, sp) for sp in SEQUENCE_PARALLEL_MODES] == [10, 12, 12]


@pytest.mark.parametrize("config, t, complaint", [
    (SMOLLM2, 2, "tp=2 cannot share 9 query and 3 KV heads: it must divide 9.* or be a .*; try --tp 1$"),
    (SMOLLM2, 8, "tp=8 cannot share 9 query and 3 KV heads.*; try --tp 3$"),
    (replace(SMOLLM2, hidden=4), 3, "leaves a rank without a part of the MLP's width of 4; try --tp 1$"),
    (replace(config_for_size("test"), vocab=9), 4,
     "leaves a rank without a part of the vocabulary of 9; try --tp 2$"),
    (ModelConfig(60, 8, 1, 4, 4, 2, 9, 8), 4, "leaves a rank without .* MLP's width of 9; try --tp 2$")])
def test_what_ranks_cannot_share_is_refused_with_a_number_that_works(config, t, complaint):
    with pytest.raises(ValueError, match=complaint) as refused:
        check_tp_fits_model(config, t)
    check_tp_fits_model(config, int(str(refused.value).split()[-1]))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(1, 20), micro_batches=st.integers(1, 2),
       dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
       sp=st.sampled_from(SEQUENCE_PARALLEL_MODES),
       recompute=st.sampled_from(["none", "selective", "full"]))
def test_a_step_sends_what_is_said(shared_configs, first_of, data, batch, seq, micro_batches, dtype, sp,
                                   recompute):
    config, t = data.draw(shared_configs)
    with first_of(t) as mesh:
        got = sent_in_a_step(config, mesh, batch, seq, micro_batches, dtype, sp, recompute)
    d = dtype.itemsize
    assert got == tp_collectives_per_step(config, t, batch, seq, micro_batches, d, d, sp, recompute)


def sent_in_a_step(config, mesh, batch, seq, micro_batches, dtype, sp, recompute):
    """{(op, tag): (calls, bytes)} in the ledger of rank 0, weights' arrival apart."""
    model = Decoder(config, "naive").to(dtype)
    tensor = TensorParallel(model, mesh, sp)
    loss = VocabParallelCrossEntropy(apply_activation_checkpointing(model, recompute).head)
    tokens = torch.zeros(batch, seq, dtype=torch.long)
    for _ in range(micro_batches):
        loss(model.hidden_states(tokens), tokens).sum().backward()
    tensor.all_reduce_partial_grads({name: p.grad for name, p in model.named_parameters()})
    calls, payload = Counter(), Counter()
    for row in mesh.comm_log.records:
        if row.tag != "weights":
            calls[row.op, row.tag] += 1
            payload[row.op, row.tag] += row.payload_bytes
    return {key: (n, payload[key]) for key, n in calls.items()}


def test_a_step_by_hand():
    """GPT-2 of 6 layers on 2 ranks, 3 micro-batches of 2 x 5 tokens: sp sends 6 tokens, one of zeros."""
    config = ModelConfig(61, 24, 6, 6, 6, 4, 96, 16, family="gpt2")
    whole, padded = 2 * 5 * 24 * 4, 2 * 6 * 24 * 2
    assert tp_collectives_per_step(config, 2, 2, 5, 3) == {
        ("all_reduce", "layers"): (3 * 6 * 4, 3 * 6 * 4 * whole), ("all_reduce", "ends"): (3 * 2, 6 * whole),
        ("all_reduce", "loss"): (3 * 3, 9 * 2 * 5 * 4)}
    assert tp_collectives_per_step(config, 2, 2, 5, 3, dtype_bytes=2, sp="gather", recompute="full") == {
        ("all_gather", "layers"): (3 * 6 * 8, 3 * 6 * 8 * padded), ("all_gather", "ends"): (9, 9 * padded),
        ("reduce_scatter", "layers"): (3 * 6 * 6, 3 * 6 * 6 * padded),
        ("reduce_scatter", "ends"): (6, 6 * padded), ("all_reduce", "loss"): (9, 9 * 2 * 5 * 4),
        ("all_reduce", "tp grads"): (1, 4 * 24 * (13 * 2 + 6 * 2 + 16))}   # norms, biases, positions
    assert tp_collectives_per_step(config, 1, 2, 5, 3, sp="keep") == {}


def test_what_is_summed_once_a_step_by_hand():
    """Nothing; norms; those of q and k; and on 9 ranks with 3 KV heads the k and v that 3 share."""
    assert tp_grad_all_reduce_sizes(SMOLLM2, 3) == []
    assert tp_grad_all_reduce_sizes(SMOLLM2, 3, "keep") == [5 * 36]
    assert tp_grad_all_reduce_sizes(replace(SMOLLM2, family="qwen3"), 3) == [2 * 2 * 4]
    assert tp_grad_all_reduce_sizes(SMOLLM2, 9) == [2 * 2 * 4 * 36]
    assert tp_grad_all_reduce_sizes(replace(SMOLLM2, family="bloom"), 9, "gather") == [
        6 * 2 * 36 + 2 * 2 * 36, 2 * 2 * (4 * 36 + 4)]                       # and biases; embed_norm


@pytest.mark.parametrize("family", KINDS)
def test_what_is_partial_is_whole_on_every_rank(family):
    config = ModelConfig(61, 24, 2, 6, 3, 10, 40, 16, family=family, tied=False)
    whole = [name for name in parameter_shapes(config) if tp_sharded_dim(name) is None]
    assert [name for name in parameter_shapes(config) if has_partial_grad(name, "keep")] == whole
    got = [name for name in parameter_shapes(config) if has_partial_grad(name)]
    assert got == [name for name in whole if "q_norm" in name or "k_norm" in name]
    assert tp_grad_all_reduce_sizes(config, 1, "keep") == []


def layer_wire_bytes(config, t, batch, seq, sp, recompute="none"):
    """Bytes that a rank sends in rings for one layer and micro-batch, in 16 bits."""
    hidden_states = batch * padded_seq_len(seq, t, sp) * config.width * 2
    calls = tp_collectives_per_layer(sp, recompute)
    return sum(n * ring_bytes_per_rank(op, hidden_states, t) for op, n in calls.items())


@pytest.mark.parametrize("t", [2, 4, 8])
def test_wire_a_layer_is_that_of_the_papers(t):
    """8 (t-1)/t bsh numbers, Shoeybi et al. 2019; 10 (t-1)/t with a gather more, Korthikanti et al. 2022."""
    config, b, s = ModelConfig(51200, 768, 12, 16, 16, 48, 3072, 1024, family="gpt2"), 3, 512
    each = (t - 1) / t * b * s * config.width * 2
    for sp, plain, full in (("none", 8, 12), ("keep", 8, 12), ("gather", 10, 14)):
        assert layer_wire_bytes(config, t, b, s, sp) == pytest.approx(plain * each)
        assert layer_wire_bytes(config, t, b, s, sp, "selective") == pytest.approx(plain * each)
        assert layer_wire_bytes(config, t, b, s, sp, "full") == pytest.approx(full * each)
    assert layer_wire_bytes(config, 1, b, s, "none") == 0


@pytest.mark.parametrize("call, complaint", [
    (lambda: tp_collectives_per_layer("cut"), "sp 'cut' is not one of none, keep, gather"),
    (lambda: tp_collectives_per_layer(recompute="half"),
     "recompute 'half' is not one of none, selective, full"),
    (lambda: tp_collectives_per_step(SMOLLM2, 2, 1, 1), "tp=2 cannot share 9 query and 3 KV heads")])
def test_unknown_names_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
