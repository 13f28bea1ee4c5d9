"""Every core against attention by hand (tests/model/seen.py): output, log-sum-exp, gradients, saved bytes."""
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.model import attention_cores
from nanoinfra.model.attention_cores import (
    ATTENTION_CORES,
    AttentionCore,
    NaiveCore,
    SdpaCore,
    find_cpu_flash_kernels,
    naive_attention,
    require_log_sum_exp,
    sdpa_attention,
)
from nanoinfra.model.attention_mask import CAUSAL_MASK, AttentionMask
from tests.model.seen import MASKS, SLOPES, attention_by_hand, draw_heads

FLASH = "_scaled_dot_product_flash_attention_for_cpu"
CORES = {"naive": NaiveCore(), "sdpa": sdpa_attention, "sdpa without torch's kernels": SdpaCore()}


@pytest.fixture(params=CORES)
def core(request, monkeypatch):
    if request.param.startswith("sdpa without"):
        monkeypatch.setattr(attention_cores, "CPU_FLASH_KERNELS", None)
    return CORES[request.param]


@functools.cache
def by_hand(name, dtype=torch.float64, KV=3):
    """(mask, inputs, y, lse, gradients of q, k and v), the last three in float64."""
    mask, T, S = MASKS[name]
    inputs = draw_heads(T, S, dtype, KV)
    q, k, v, dy = (x.double() for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    y, lse = attention_by_hand(q, k, v, mask)
    grads = torch.autograd.grad((y * dy).sum() + 0 * sum(x.sum() for x in (q, k, v)), (q, k, v))
    return mask, inputs, y.detach(), lse.detach(), grads


def agree(got, want, tol=1e-11):
    torch.testing.assert_close(got.to(want.dtype), want, rtol=tol, atol=tol)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("KV", [1, 3])
def test_a_core_is_attention_by_hand(core, name, KV):
    mask, (q, k, v, dy), want_y, want_lse, want = by_hand(name, KV=KV)
    y, lse = core.forward(q, k, v, mask)
    assert (y.dtype, lse.dtype, lse.shape) == (torch.float64, torch.float64, q.shape[:3])
    agree(y, want_y, 1e-12)
    agree(lse, want_lse, 1e-12)
    for got, grad in zip(core.backward(dy, q, k, v, y, lse, mask), want, strict=True):
        agree(got, grad)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("attend", [naive_attention, *CORES.values()], ids=["naive_attention", *CORES])
def test_a_call_is_differentiable(attend, name, monkeypatch):
    if attend is CORES["sdpa without torch's kernels"]:
        monkeypatch.setattr(attention_cores, "CPU_FLASH_KERNELS", None)
    mask, (q, k, v, dy), want_y, _, want = by_hand(name)
    agree(attend(q, k, v, mask), want_y, 1e-12)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves, mask)
    agree(y.detach(), want_y, 1e-12)
    for got, grad in zip(torch.autograd.grad(y, leaves, dy), want, strict=True):
        agree(got, grad)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_lower_precisions_round_and_no_more(core, name, dtype, tol):
    mask, (q, k, v, dy), want_y, want_lse, want = by_hand(name, dtype)
    y, lse = core.forward(q, k, v, mask)
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    agree(y, want_y, tol)
    agree(lse, want_lse, 1e-5)
    for got, grad in zip(core.backward(dy, q, k, v, y, lse, mask), want, strict=True):
        assert got.dtype == dtype
        agree(got, grad, 2 * tol)


@pytest.mark.parametrize("name", MASKS)
def test_a_parts_gradients_need_only_the_wholes_output_and_log_sum_exp(core, name):
    """Keys in two parts, each told y and lse of all keys: together the gradients are the whole's."""
    mask, (q, k, v, dy), y, lse, want = by_hand(name)
    first_query, first_key = mask.first_positions or (k.shape[2] - q.shape[2], 0)
    middle = k.shape[2] // 2
    parts = [core.backward(dy, q, k[:, :, keys], v[:, :, keys], y, lse,
                           mask._replace(first_positions=(first_query, first_key + (keys.start or 0))))
             for keys in (slice(None, middle), slice(middle, None))]
    agree(parts[0][0] + parts[1][0], want[0])
    for i in (1, 2):
        agree(torch.cat([part[i] for part in parts], 2), want[i])


@pytest.mark.parametrize("name", MASKS)
def test_autograd_keeps_q_k_v_the_output_and_its_log_sum_exp_and_no_scores(name):
    mask, T, S = MASKS[name]
    q, k, v, _ = (x.requires_grad_() for x in draw_heads(T, S, torch.bfloat16))
    for core in (NaiveCore(), sdpa_attention):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = core(q, k, v, mask)
        lse = 4 * q[..., 0].numel()
        assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in (q, k, v, y)) + lse
        assert y.shape == q.shape


class Operations(TorchDispatchMode):
    """Which of torch's operations run, with the shapes of what torch's kernel is given."""

    def __init__(self):
        super().__init__()
        self.kernels, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(FLASH):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]    # q, k, v; or dy, q, k, v, y, lse
            q, k = tensors[:2] if len(tensors) == 3 else tensors[1:3]
            is_causal = any(a is True for a in args)
            self.kernels.append((q.shape[2], k.shape[2], is_causal, (kwargs or {}).get("attn_mask")))
        elif isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("mask, T, S, want", [
    (CAUSAL_MASK, 40, 40, [(40, 40, True)]),
    (CAUSAL_MASK, 1, 40, [(1, 40, False)]),
    (AttentionMask(window=40), 40, 40, [(40, 40, True)]),
    (AttentionMask(first_positions=(80, 80)), 40, 40, [(40, 40, True)]),
    (AttentionMask(first_positions=(80, 40)), 40, 40, [(40, 40, False)]),
    (AttentionMask(first_positions=(40, 80)), 40, 40, []),
    (AttentionMask(window=9, first_positions=(80, 20)), 40, 40, []),
    (AttentionMask(causal=False), 40, 30, [(40, 30, False)]),
    (AttentionMask(document_ends=(7, 30, 40)), 40, 40, [(7, 7, True), (23, 23, True), (10, 10, True)]),
    (AttentionMask(first_positions=(20, 0), document_ends=(10, 25, 60)), 20, 20, [(5, 10, False)])])
def test_blocks_are_skipped_whole_or_diagonal_without_a_tensor_of_pairs(mask, T, S, want):
    """A mechanism: which calls torch's kernel gets, forward and backward, and that no tensor is T x S."""
    q, k, v, dy = draw_heads(T, S, torch.float32, K=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Operations() as ran:
        y = sdpa_attention(*leaves, mask)
        torch.autograd.grad(y, leaves, dy)
    assert [call[:3] for call in ran.kernels] == want + want
    assert all(call[3] is None for call in ran.kernels) and ran.largest <= max(x.numel() for x in leaves)


def test_a_mask_that_is_neither_is_a_tensor_in_forward_and_again_in_backward():
    q, k, v, dy = draw_heads(9, 9, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    masks = {AttentionMask(window=3): (9, 9), AttentionMask(alibi_slopes=SLOPES): (1, 6, 9, 9)}
    for mask, shape in masks.items():
        with Operations() as ran:
            torch.autograd.grad(sdpa_attention(*leaves, mask), leaves, dy)
        assert [call[3].shape for call in ran.kernels] == [shape] * 2
        assert all(call[3].dtype == torch.float32 for call in ran.kernels)


def test_values_are_torchs_own_bit_for_bit():
    """The kernel is the one that F.scaled_dot_product_attention calls."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, dy = draw_heads(33, 33, dtype)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        seen = torch.ones(33, 33, dtype=torch.bool).tril() & torch.ones(33, 33, dtype=torch.bool).triu(-6)
        for mask, how in ((CAUSAL_MASK, {"is_causal": True}), (AttentionMask(window=7), {"attn_mask": seen})):
            want, got = sdpa(*leaves, **how, enable_gqa=True), sdpa_attention(*leaves, mask)
            assert torch.equal(got, want)
            pairs = zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy))
            assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("layout", ["(B, T, H, K)", "K apart", "one gradient for all"])
def test_strides_do_not_matter(layout):
    """torch's kernel reads wrong numbers, without a word, where those of a row are not side by side."""
    mask, (q, k, v, dy), want_y, _, want = by_hand("causal")
    if layout == "one gradient for all":
        dy = torch.ones((), dtype=dy.dtype).expand(dy.shape)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(attention_by_hand(*leaves, mask)[0].sum(), leaves)
    dims = (1, 2) if layout == "(B, T, H, K)" else (2, 3)
    q, k, v = (x.transpose(*dims).contiguous().transpose(*dims) for x in (q, k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = sdpa_attention(*leaves, mask)
    agree(y.detach(), want_y, 1e-12)
    for got, grad in zip(torch.autograd.grad(y, leaves, dy), want):
        agree(got, grad)


def test_torchs_private_kernels_have_the_signature_that_is_called():
    """If this fails on a new torch: the call in attention_cores.py, or the fallback, is to be looked at."""
    forward, backward = find_cpu_flash_kernels()
    ending = "*, Tensor? attn_mask=None, float? scale=None) -> "
    assert str(forward._schema) == (
        f"aten::{FLASH}(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, "
        f"{ending}(Tensor output, Tensor logsumexp)")
    assert str(backward._schema) == (
        f"aten::{FLASH}_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
        f"Tensor logsumexp, float dropout_p, bool is_causal, {ending}"
        "(Tensor grad_query, Tensor grad_key, Tensor grad_value)")


def test_where_torch_lacks_them_its_public_function_takes_the_call(monkeypatch):
    class Without:
        pass
    monkeypatch.setattr(torch.ops, "aten", Without())
    assert find_cpu_flash_kernels() is None
    monkeypatch.undo()
    monkeypatch.setattr(attention_cores, "CPU_FLASH_KERNELS", None)
    called = []
    public = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *args, **named: called.append(named["is_causal"]) or public(*args, **named))
    q, k, v, _ = draw_heads(7, 7)
    for mask in (CAUSAL_MASK, AttentionMask(window=3)):
        agree(sdpa_attention(q, k, v, mask), NaiveCore()(q, k, v, mask), 1e-12)
    assert called == [True, False]


def test_heads_of_values_may_have_another_width():
    """torch's fused kernel has no such; its public function has."""
    q, k, _, _ = draw_heads(7, 7)
    v = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    for core in (sdpa_attention, NaiveCore(), naive_attention):
        agree(core(q, k, v), attention_by_hand(q, k, v, CAUSAL_MASK)[0], 1e-12)


def test_alibi_in_16_bits_is_as_precise_as_the_output():
    """The bias is a float32 tensor: rounding it to 16 bits would lose ten times as much."""
    draws = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 6, 400, 16, generator=draws).bfloat16() for _ in range(3))
    mask = AttentionMask(alibi_slopes=SLOPES)
    want = NaiveCore().forward(q.double(), k.double(), v.double(), mask)[1]
    assert (sdpa_attention.forward(q, k, v, mask)[1] - want).abs().max() < 1e-4


class ForwardOnly(AttentionCore):
    def forward(self, q, k, v, mask):
        return NaiveCore().forward(q, k, v, mask)


class NoLogSumExp(AttentionCore):
    def forward(self, q, k, v, mask):
        return naive_attention(q, k, v, mask)

    def backward(self, dy, q, k, v, y, lse, mask):
        raise AssertionError("is not reached")


def test_a_core_without_backward_is_refused_when_it_is_called_with_grad():
    q, k, v, _ = draw_heads(5, 5)
    agree(ForwardOnly()(q, k, v), naive_attention(q, k, v), 1e-12)
    for i in range(3):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
        with torch.no_grad():
            ForwardOnly()(*inputs)
        with pytest.raises(NotImplementedError, match=r"ForwardOnly has no backward\(dy, q, k, v, y, lse"):
            ForwardOnly()(*inputs)
    with pytest.raises(NotImplementedError, match=r"ForwardOnly has no backward"):
        ForwardOnly().backward(q, q, k, v, q, q, CAUSAL_MASK)
    with pytest.raises(NotImplementedError, match=r"AttentionCore has no forward\(q, k, v, mask\)"):
        AttentionCore()(q, k, v)


@pytest.mark.parametrize("B", [1, 2])
def test_a_core_without_a_log_sum_exp_is_refused(B):
    q, k, v, _ = (x[:B] for x in draw_heads(5, 5))
    for inputs in ((q, k, v), [x.clone().requires_grad_() for x in (q, k, v)]):
        with pytest.raises(TypeError, match=rf"NoLogSumExp.forward must return \(y, lse\).*\[{B}, 6, 5\]"):
            NoLogSumExp()(*inputs)


def test_a_plain_function_is_a_core_but_cannot_be_merged():
    assert ATTENTION_CORES == {"naive": naive_attention, "sdpa": sdpa_attention}
    with pytest.raises(TypeError, match="naive_attention is a plain function: it yields no log-sum-exp"):
        require_log_sum_exp(naive_attention)
    assert require_log_sum_exp(sdpa_attention) is sdpa_attention


def test_gradients_of_gradients_are_refused():
    q, k, v, _ = (x.requires_grad_() for x in draw_heads(5, 5))
    dq, = torch.autograd.grad(sdpa_attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()
