"""Embedding, head and loss cut along the vocabulary: torch's numbers, whoever has the rows."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh, single_rank_axis
from nanoinfra.parallel import vocab_parallel
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion
from nanoinfra.parallel.vocab_parallel import (
    ParallelLMHead,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

B, T, C, V = 2, 5, 6, 11                               # 11 tokens: 6 and 5, or 3, 3, 3, 2


def inputs(dtype=torch.float64, scale=1.0):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=random).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, C, generator=random)).to(dtype)
    targets = torch.randint(V, (B, T), generator=random)
    targets[0, :2] = IGNORE_INDEX
    return hidden, weight, targets


def torch_loss(hidden, weight, targets):
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / 8


def rows(n, rank):
    each = -(-V // n)
    return rank * each, min(V, (rank + 1) * each)


def part_of_the_loss(scale, rows_bytes=None):
    axis = Mesh(tp=torch.distributed.get_world_size()).tp
    if rows_bytes:
        vocab_parallel._LOGITS_CHUNK_BYTES, kept = rows_bytes, vocab_parallel._LOGITS_CHUNK_BYTES
    hidden, weight, targets = inputs(scale=scale)
    start, stop = rows(axis.size, axis.rank)
    mine = weight[start:stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(hidden, mine, targets, TensorParallelRegion(axis), start).sum() / 8
    (3 * loss).backward()
    if rows_bytes:
        vocab_parallel._LOGITS_CHUNK_BYTES = kept
    return loss.detach(), hidden.grad, (start, stop), mine.grad


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("scale, rows_bytes", [(1.0, None), (1.0, 1), (1e4, None)])
def test_loss_and_gradients_are_torchs(ranks, n, scale, rows_bytes):
    hidden, weight, targets = inputs(scale=scale)
    want = torch_loss(hidden, weight.requires_grad_(), targets)
    assert scale == 1.0 or (hidden @ weight.T).abs().max() > 1e4           # exp would overflow
    (3 * want).backward()
    for loss, d_hidden, (start, stop), d_weight in ranks(n).run(part_of_the_loss, scale, rows_bytes):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(d_hidden, hidden.grad, rtol=1e-12, atol=1e-13 * scale)
        torch.testing.assert_close(d_weight, weight.grad[start:stop], rtol=1e-12, atol=1e-14)


def ends(sp):
    axis = Mesh(tp=torch.distributed.get_world_size()).tp
    region = SequenceParallelRegion(axis, save_gathered=sp
                                    == "keep") if sp != "none" else TensorParallelRegion(axis)
    random = torch.Generator().manual_seed(1)
    embedding, head = nn.Embedding(V, C).double(), nn.Linear(C, V, bias=False).double()
    start, stop = rows(axis.size, axis.rank)
    for module in (embedding, head):
        whole = torch.randn(V, C, generator=random, dtype=torch.float64)
        module.weight = nn.Parameter(whole[start:stop].clone())
    embed = VocabParallelEmbedding(embedding, start, region)
    logits = ParallelLMHead(head, start, V, region)(embed(inputs()[2].clamp(min=0)))
    logits.square().sum().backward()
    return logits.detach(), (start, stop), embedding.weight.grad, head.weight.grad


@pytest.mark.parametrize("sp", ["none", "keep", "gather"])
@pytest.mark.parametrize("n", [2, 4])
def test_all_logits_from_tokens_and_back(ranks, n, sp):
    random = torch.Generator().manual_seed(1)
    table, head = (torch.randn(V, C, generator=random, dtype=torch.float64).requires_grad_() for _ in "ab")
    tokens = inputs()[2].clamp(min=0)
    want = F.embedding(tokens, table) @ head.T
    want.square().sum().backward()
    for logits, (start, stop), d_table, d_head in ranks(n).run(ends, sp):
        torch.testing.assert_close(logits, want.detach(), rtol=1e-12, atol=1e-12)
        assert d_table.is_sparse and d_table._nnz() == tokens.numel()      # not (stop - start) rows
        torch.testing.assert_close(d_table.to_dense(), table.grad[start:stop], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d_head, head.grad[start:stop], rtol=1e-12, atol=1e-12)


def test_a_whole_head_needs_no_ranks():
    hidden, weight, targets = inputs()
    head = nn.Linear(C, V, bias=False).double()
    head.weight = nn.Parameter(weight)
    torch.testing.assert_close(VocabParallelCrossEntropy(head)(hidden, targets).sum() / 8,
                               torch_loss(hidden, weight, targets))
    whole = ParallelLMHead(head, 0, V, TensorParallelRegion(single_rank_axis("tp")))
    torch.testing.assert_close(whole(hidden), head(hidden))
    torch.testing.assert_close(whole(hidden[0, -1]), head(hidden[0, -1]))  # one token's: (V,)


def test_each_token_has_its_own_minus_log_p_and_may_weigh_its_own_in_the_loss():
    factors = torch.rand(B, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (hidden, weight, targets), (hidden2, weight2, _) = inputs(), inputs()
    region = TensorParallelRegion(single_rank_axis("tp"))
    got = vocab_parallel_cross_entropy(hidden, weight.requires_grad_(), targets, region, 0)
    want = F.cross_entropy((hidden2 @ weight2.requires_grad_().T).mT, targets, ignore_index=IGNORE_INDEX,
                           reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert got.shape == (B, T) and (got[targets == IGNORE_INDEX] == 0).all()
    for nll in (got, want):
        (factors * nll.square()).sum().backward()
    torch.testing.assert_close(hidden.grad, hidden2.grad, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(weight.grad, weight2.grad, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_multiply_in_float32_and_round_once(monkeypatch, dtype):
    """Without a float32 copy of the whole: what it makes on the way is no larger than a chunk."""
    chunk_bytes = 1 << 12
    monkeypatch.setattr(vocab_parallel, "_LOGITS_CHUNK_BYTES", chunk_bytes)
    random = torch.Generator().manual_seed(0)
    x, factors = torch.randn(300, 16, generator=random).to(dtype), torch.rand(300, 1, generator=random)
    factors[::2] = 1 / 3                                                   # which has no such number
    want, out = (x.float() * factors).to(dtype), torch.empty_like(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        vocab_parallel._multiply_rows(x, factors, out=out)
    events = watched.profiler.kineto_results.events()
    made = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert torch.equal(out, want) and not torch.equal(out, x * factors.to(dtype))
    assert 0 < max(made) <= chunk_bytes < 4 * x.numel()
