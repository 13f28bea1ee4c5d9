"""A core from outside: it splits the keys, calls another core on each half and merges by log-sum-exp.

That is what ring, chunked and flash attention do. It plugs into a whole decoder, on one rank and on two, with
recompute and with packed documents, and no file of the library knows it.
"""
import pytest
import torch

from nanoinfra.distributed.mesh import Mesh
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.attention import ForwardContext
from nanoinfra.model.attention_cores import (
    AttentionCore,
    NaiveCore,
    naive_attention,
    require_log_sum_exp,
    sdpa_attention,
)
from nanoinfra.model.attention_mask import AttentionMask, query_and_key_positions
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.pipeline.split_backward import SplitBackward
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from tests.model.seen import MASKS, attention_by_hand, draw_heads
from tests.parallel.test_tensor_parallel_decoder import config
from tests.parity import assert_same_gradients

FAMILIES = ["gpt2", "qwen3", "bloom", "window above"]
T, ENDS = 11, (4, 5, 11)


class SplitKeys(AttentionCore):
    """Attention to the first half of the keys and to the second, each by `inner`."""

    def __init__(self, inner):
        self.inner, self.calls = require_log_sum_exp(inner), 0

    def halves(self, q, k, mask):
        queries, keys = query_and_key_positions(mask, q.shape[2], k.shape[2])
        middle = len(keys) // 2
        for begin, end in ((0, middle), (middle, len(keys))):
            self.calls += 1
            yield slice(begin, end), mask._replace(first_positions=(queries.start, keys.start + begin))

    def forward(self, q, k, v, mask):
        halves = [self.inner.forward(q, k[:, :, keys], v[:, :, keys], part)
                  for keys, part in self.halves(q, k, mask)]
        lse = torch.logaddexp(*(lse for _, lse in halves))                # (B, H, T)
        shares = [(each - lse).exp().nan_to_num(0.0).unsqueeze(-1) for _, each in halves]
        return sum(share * y for share, (y, _) in zip(shares, halves)).to(q.dtype), lse

    def backward(self, dy, q, k, v, y, lse, mask):
        halves = [self.inner.backward(dy, q, k[:, :, keys], v[:, :, keys], y, lse, part)
                  for keys, part in self.halves(q, k, mask)]
        dq, dk, dv = zip(*halves)
        return sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("inner", [NaiveCore(), sdpa_attention, SplitKeys(sdpa_attention)],
                         ids=["naive", "sdpa", "split again"])
def test_halves_merge_to_the_whole(name, inner):
    mask, length, S = MASKS[name]
    *inputs, dy = draw_heads(length, S)
    leaves = [x.requires_grad_() for x in inputs]
    want, want_lse = attention_by_hand(*leaves, mask)
    grads = torch.autograd.grad((want * dy).sum() + 0 * sum(x.sum() for x in leaves), leaves)
    core = SplitKeys(inner)
    got = core(*leaves, mask)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(core.forward(*leaves, mask)[1], want_lse, rtol=1e-11, atol=1e-11)
    for ours, grad in zip(torch.autograd.grad(got, leaves, dy), grads, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-10, atol=1e-11)


def decoder(family, core=None, recompute="none"):
    model = init_weights(Decoder(config(family)), seed=3).double()
    for block in model.blocks if core else ():
        block.attn.core = core
    return apply_activation_checkpointing(model, recompute)


def gradients(model, document_ends=None, positions=None):
    tokens = torch.randint(37, (2, T), generator=torch.Generator().manual_seed(1))
    hidden = model.hidden_states(tokens, positions, document_ends=document_ends)
    draws = torch.Generator().manual_seed(2)
    hidden.backward(torch.randn(hidden.shape, generator=draws, dtype=torch.float64))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute, forwards", [("none", 1), ("full", 2)])
@pytest.mark.parametrize("ends", [None, ENDS])
def test_a_decoder_trains_with_it(family, recompute, forwards, ends):
    want, core = gradients(decoder(family), ends), SplitKeys(sdpa_attention)
    assert_same_gradients(gradients(decoder(family, core, recompute), ends), want)
    assert core.calls == 2 * 2 * (forwards + 1)                           # halves, layers, and a backward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_ranks_train_with_it(ranks, family, recompute):
    want = gradients(decoder(family))
    for rank, (got, shards) in enumerate(ranks(2).run(on_a_rank, family, recompute)):
        mine = {name: grad[shards[name].slices_within()] for name, grad in want.items()}
        assert_same_gradients({name: got[name] for name in mine}, mine, where=f"rank {rank}")


def on_a_rank(family, recompute):
    """(gradients of this rank's parameters, their parts of the whole)."""
    model = decoder(family, SplitKeys(sdpa_attention))
    cut = TensorParallel(model, Mesh(tp=2))
    assert all(type(block.attn.core) is SplitKeys for block in model.blocks)
    apply_activation_checkpointing(model, recompute)
    model.zero_grad()
    grads = {name: grad.to_dense() for name, grad in gradients(model).items()}     # embedding: sparse
    return cut.all_reduce_partial_grads(grads), cut.parameter_shards


@pytest.mark.parametrize("core", [None, SplitKeys(sdpa_attention)], ids=["sdpa", "split"])
def test_a_backward_in_two_halves_runs_it_once(core):
    """Zero-bubble schedules: the input's gradient first, the weights' later."""
    want, x = decoder("qwen3"), torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
    want.blocks_and_norm(x, torch.arange(T)).square().sum().backward()
    got, leaf = decoder("qwen3", core), x.detach().requires_grad_()
    y = got.blocks_and_norm(leaf, torch.arange(T)).square().sum()
    calls = core.calls if core else 0
    both = SplitBackward(y, leaf)
    both.backward_input(None)
    torch.testing.assert_close(leaf.grad, x.grad, rtol=1e-11, atol=1e-12)
    both.backward_weight()
    assert not core or core.calls - calls == 2 * 2
    assert_same_gradients({name: p.grad for name, p in got.blocks.named_parameters()},
                          {name: p.grad for name, p in want.blocks.named_parameters()})


def test_what_yields_no_log_sum_exp_cannot_be_split():
    """Nor can a core that recompute wraps: it is a function then."""
    with pytest.raises(TypeError, match="naive_attention is a plain function: it yields no log-sum-exp"):
        SplitKeys(naive_attention)
    model = apply_activation_checkpointing(Decoder(config("gpt2"), "naive"), "selective")
    with pytest.raises(TypeError, match="partial is a plain function: it yields no log-sum-exp"):
        SplitKeys(model.blocks[0].attn.core)


def test_selective_recompute_has_nothing_to_do_with_it():
    with pytest.raises(ValueError, match="splitkeys keeps none"):
        decoder("gpt2", SplitKeys(sdpa_attention), "selective")


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "mistral"])
@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_packed_documents_are_as_if_alone(family, attention):
    """Each document's hidden states are those of a row of its own: attention does not cross the ends."""
    model = init_weights(Decoder(config(family), attention), seed=3).double()
    tokens = torch.randint(37, (2, T), generator=torch.Generator().manual_seed(1))
    spans = list(zip((0, *ENDS), ENDS))
    positions = torch.cat([torch.arange(end - begin) for begin, end in spans])
    got = model.hidden_states(tokens, positions, document_ends=ENDS)
    for begin, end in spans:
        want = model.hidden_states(tokens[:, begin:end])
        torch.testing.assert_close(got[:, begin:end], want, rtol=1e-10, atol=1e-11)
    assert (model.hidden_states(tokens, positions) - got)[:, 5:].abs().max() > 1e-4
    torch.testing.assert_close(model(tokens, positions, None, ENDS), model.head(got))


def test_blocks_hand_one_context_on():
    """The documents reach every layer's core, by its own mask; a cache is given the layer's mask alone."""
    model, seen = decoder("window above"), []
    for block in model.blocks:
        block.attn.core = lambda q, k, v, mask: seen.append(mask) or q
    model.hidden_states(torch.zeros(1, T, dtype=torch.long), document_ends=ENDS)
    assert seen == [AttentionMask(document_ends=ENDS), AttentionMask(window=4, document_ends=ENDS)]
    assert ForwardContext() == (None, None, None)


@pytest.mark.parametrize("ends", [(), (4, 10), (4, 12), (4, 4, 11), (0, 11), (6, 4, 11)])
def test_documents_that_do_not_cut_the_row_are_refused(ends):
    tokens = torch.zeros(1, T, dtype=torch.long)
    with pytest.raises(ValueError, match="do not cut a row of 11 tokens into documents.*the last one 11"):
        decoder("gpt2").hidden_states(tokens, document_ends=ends)
    with pytest.raises(ValueError, match="give document_ends or a cache"):
        decoder("gpt2").hidden_states(tokens, cache=object(), document_ends=(11,))
