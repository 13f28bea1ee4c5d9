import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanoinfra.config import ModelConfig
from nanoinfra.model.attention import Attention
from nanoinfra.model.attention_cores import naive_attention, sdpa_attention
from nanoinfra.model.attention_mask import CAUSAL_MASK, AttentionMask, alibi_slopes


def heads(T=5, S=5, dtype=torch.float64):
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(2, h, n, 6, generator=draws, dtype=dtype) for h, n in ((6, T), (3, S), (3, S))]


def by_hand(q, k, v, slopes=(0.0,) * 6):
    """Token by token and head by head, with no mask and no grouping; ALiBi by distance."""
    (B, H, T, K), S, out = q.shape, k.shape[2], torch.zeros_like(q)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        seen, kv = S - T + t + 1, h // (H // k.shape[1])
        bias = slopes[h] * torch.arange(1 - seen, 1)
        weights = (k[b, kv, :seen] @ q[b, h, t] / math.sqrt(K) + bias).softmax(0)
        out[b, h, t] = weights @ v[b, kv, :seen]
    return out


@pytest.mark.parametrize("core", [naive_attention, sdpa_attention])
@pytest.mark.parametrize("T, S", [(5, 5), (3, 8), (1, 8), (1, 1)])
def test_cores_match_attention_by_hand(core, T, S):
    q, k, v = heads(T, S)
    torch.testing.assert_close(core(q, k, v), by_hand(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", [naive_attention, sdpa_attention])
@pytest.mark.parametrize("T, S", [(5, 5), (3, 8), (1, 8)])
def test_cores_match_alibi_by_hand(core, T, S):
    q, k, v = heads(T, S)
    want = by_hand(q, k, v, alibi_slopes(6))
    torch.testing.assert_close(core(q, k, v, AttentionMask(alibi_slopes=alibi_slopes(6))), want, rtol=1e-12,
                               atol=1e-12)
    assert (core(q, k, v) - want).abs().max() > 0.05


def test_slopes_are_the_papers_and_blooms():
    """Press et al. 2022, section 3: 1/2 .. 1/256 for 8 heads; their code, as BLOOM's, for other numbers."""
    assert alibi_slopes(8) == tuple(2.0 ** -h for h in range(1, 9))
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes
    for n in (1, 2, 3, 5, 6, 16, 25, 112):
        want = _get_alibi_slopes(n, "cpu")
        torch.testing.assert_close(torch.tensor(alibi_slopes(n)), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("core", [naive_attention, sdpa_attention])
def test_alibi_in_bfloat16_loses_less_than_transformers_does(core):
    """Theirs rounds slope * place to 16 bits: at place 1500 and slope 1/2 to a multiple of 4."""
    draws, slopes = torch.Generator().manual_seed(0), alibi_slopes(8)
    q, k, v = (torch.randn(1, 8, n, 16, generator=draws, dtype=torch.bfloat16) for n in (8, 1500, 1500))
    want = naive_attention(q.double(), k.double(), v.double(), AttentionMask(alibi_slopes=slopes))
    places = (torch.tensor(slopes)[:, None] * torch.arange(1500)).bfloat16()              # (H, S)
    future = torch.ones(8, 1500, dtype=torch.bool).triu(1493)
    scores = (q @ k.mT / 4 + places[:, None]).masked_fill(future, -math.inf)
    theirs = scores.softmax(-1, dtype=torch.float32).bfloat16() @ v
    lost, ours = ((x - want).abs().max() for x in (theirs, core(q, k, v, AttentionMask(alibi_slopes=slopes))))
    assert ours < 0.05 < 0.5 < lost


@pytest.mark.parametrize("core", [naive_attention, sdpa_attention])
@pytest.mark.parametrize("T", [1, 4, 9])
@pytest.mark.parametrize("slopes", [None, alibi_slopes(6)])
def test_a_window_is_as_if_the_keys_before_it_were_not_there(core, T, slopes):
    draws = torch.Generator().manual_seed(0)
    shapes = (2, 6, T, 4), (2, 3, 9, 4), (2, 3, 9, 4)
    q, k, v = (torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes)
    for window in (1, 3, 8, 9, 20):
        got = core(q, k, v, AttentionMask(window, slopes))
        for t in range(T):
            end = 9 - T + t + 1
            near = slice(max(0, end - window), end)
            want = naive_attention(q[:, :, t:t + 1], k[:, :, near], v[:, :, near],
                                   AttentionMask(alibi_slopes=slopes))
            torch.testing.assert_close(got[:, :, t:t + 1], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("core", [naive_attention, sdpa_attention])
def test_no_query_sees_the_future(core):
    q, k, v = heads()
    want = core(q, k, v)[:, :, :3]
    k[:, :, 3:], v[:, :, 3:] = 1e3, -1e3
    torch.testing.assert_close(core(q, k, v)[:, :, :3], want, rtol=0, atol=0)


@pytest.mark.parametrize("mask", [CAUSAL_MASK, AttentionMask(alibi_slopes=alibi_slopes(6)),
                                  AttentionMask(window=3)])
def test_gradients_of_both_cores_agree(mask):
    grads = []
    for core in (naive_attention, sdpa_attention):
        q, k, v = (x.requires_grad_() for x in heads())
        core(q, k, v, mask).square().sum().backward()
        grads.append([x.grad for x in (q, k, v)])
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_naive_keeps_the_scores_and_softmaxes_bfloat16_in_float32():
    q, k, v = heads(64, 64, torch.bfloat16)
    wide = naive_attention(*(x.float() for x in (q, k, v)))
    assert (naive_attention(q, k, v) - wide).abs().max() < 0.02
    with FlopCounterMode(display=False) as counted:
        naive_attention(q, k, v)
    assert counted.get_total_flops() == 2 * 2 * (2 * 6 * 64 * 64 * 6)        # B H T S K, twice, 2 FLOPs each


def test_unknown_core_is_refused_by_name():
    config = ModelConfig(8, 4, 1, 1, 1, 4, 6, 8)
    with pytest.raises(ValueError, match="attention 'magic' is not one of naive, sdpa"):
        Attention(config, 0, "magic")
