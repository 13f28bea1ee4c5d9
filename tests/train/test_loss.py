"""The fused loss is torch's cross-entropy, divided once by the count it is given."""
import pytest
import torch
import torch.nn.functional as F

from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.parallel import vocab_parallel
from nanoinfra.train.loss import IGNORE_INDEX, count_valid_tokens, linear_cross_entropy


def inputs(dtype=torch.float64, B=3, T=7, C=5, V=11):
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(V, (B, T), generator=random)
    targets[0, 2:], targets[2] = IGNORE_INDEX, IGNORE_INDEX
    return hidden, weight, targets


def torch_loss(hidden, weight, targets, count):
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count


@pytest.mark.parametrize("rows_bytes", [1, 300, 2 << 20])                  # one row at a time, a few, all
def test_loss_and_gradients_are_torchs(monkeypatch, rows_bytes):
    monkeypatch.setattr(vocab_parallel, "_LOGITS_CHUNK_BYTES", rows_bytes)
    (h, w, y), (h2, w2, _) = inputs(), inputs()
    got, want = linear_cross_entropy(h, w, y, 9), torch_loss(h2, w2, y, 9)
    got.backward(torch.tensor(2.0, dtype=torch.float64))
    want.backward(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(h.grad, h2.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(w.grad, w2.grad, rtol=1e-12, atol=1e-15)


def test_count_is_the_only_divisor():
    h, w, y = inputs()
    whole, ninth = linear_cross_entropy(h, w, y, 1).item(), linear_cross_entropy(h, w, y, 9).item()
    assert ninth * 9 == pytest.approx(whole, rel=1e-14)


def test_bf16_sums_in_float32_and_returns_it():
    (h, w, y), (h2, w2, _) = inputs(torch.bfloat16), inputs(torch.bfloat16)
    got = linear_cross_entropy(h, w, y, 9)
    assert got.dtype == torch.float32
    logits = (h2 @ w2.T).flatten(0, 1).float()
    want = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / 9
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    got.backward()
    want.backward()
    torch.testing.assert_close(w.grad, w2.grad, rtol=0.02, atol=2e-3)      # bf16 has 8 bits


def test_float16_keeps_the_gradients_of_unlikely_tokens():
    """Probabilities of 1e-6 are below float16's normal numbers: their gradients came out 3 % off."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.ones(1, 1, 1, dtype=torch.float16, requires_grad=True)
    weight = (-14 + torch.rand(500, 1, generator=random)).half()
    weight[0] = 0.0                                                        # the likely one, and the target
    w, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    linear_cross_entropy(hidden, w, torch.zeros(1, 1, dtype=torch.long), 1).backward(torch.tensor(2.0**16))
    linear_cross_entropy(hidden.double(), exact, torch.zeros(1, 1, dtype=torch.long), 1).backward()
    got, want = w.grad.double()[1:] / 2**16, exact.grad[1:]
    assert ((got - want).abs() / want).max() < 5e-3


def test_nothing_but_ignored_targets_is_zero_with_zero_gradients():
    h, w, y = inputs()
    got = linear_cross_entropy(h, w, torch.full_like(y, IGNORE_INDEX), 0)
    got.backward()
    assert got == 0 and h.grad.abs().sum() == 0 and w.grad.abs().sum() == 0


def test_one_copy_of_the_logits_is_kept():
    h, w, y = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(h, w, y, 9)
    assert kept == [(3, 7, 5), (11, 5), (21, 11)]


def test_count_valid_takes_one_all_reduce_and_carries_flags(ranks):
    for got, ops in ranks(3).run(counted):
        assert got == [1 + 2 + 3, 0 + 1 + 2]
        assert ops == [("all_reduce", "scalars", 16)]


def counted():
    mesh = Mesh(dp=3)
    y = torch.full((1, 4), IGNORE_INDEX)
    y[0, :mesh.rank + 1] = 5
    got = count_valid_tokens([Batch(y, y)], mesh.data, mesh.rank)
    return got, [(row.op, row.tag, row.payload_bytes) for row in mesh.comm_log.records]
