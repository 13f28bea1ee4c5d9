"""The optimizer is torch's on float32 masters; clipping and the rate's path are what their formulas say."""
import math

import pytest
import torch
from torch import nn

from nanoinfra.train.optimizer import (
    ADAMW_BETAS,
    ADAMW_WEIGHT_DECAY,
    MixedPrecisionOptimizer,
    scheduled_learning_rate,
    unscale_and_clip_grads,
)


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)).to(dtype)


def draws(model, step):
    random = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=random).to(p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_three_steps_are_torchs(name):
    ours, theirs = net(), net()
    optimizer = MixedPrecisionOptimizer(ours, name)
    if name == "sgd":
        oracle = torch.optim.SGD(theirs.parameters(), lr=0.1)
    else:
        decays = [{"params": [p], "weight_decay": ADAMW_WEIGHT_DECAY * (p.dim() > 1)} for p
                  in theirs.parameters()]
        oracle = torch.optim.AdamW(decays, lr=0.1, betas=ADAMW_BETAS, foreach=False)
    for step in range(3):
        optimizer.step(draws(ours, step), lr=0.1)
        for n, p in theirs.named_parameters():
            p.grad = draws(theirs, step)[n]
        oracle.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bf16_model_has_float32_masters_that_keep_small_steps():
    model = net(torch.bfloat16)
    drawn = {n: p.detach().float() + 1e-4 for n, p in model.named_parameters()}
    optimizer = MixedPrecisionOptimizer(model, "sgd", {n: m.clone() for n, m in drawn.items()})
    ones = {n: torch.ones_like(m) for n, m in drawn.items()}
    before = model[0].weight.detach().clone()
    for _ in range(8):
        optimizer.step(ones, lr=1e-5)                                      # each too small for bf16's 8 bits
    for n, p in model.named_parameters():
        want = drawn[n] - 8e-5
        torch.testing.assert_close(optimizer.master_weights[n], want, rtol=1e-5, atol=1e-7)
        assert p.dtype == torch.bfloat16 and torch.equal(p, optimizer.master_weights[n].bfloat16())
    assert optimizer.master_weights["0.weight"].dtype == torch.float32 and before.dtype == torch.bfloat16


def test_float32_model_is_its_own_master():
    model = net(torch.float32)
    assert all(m is p for m, p
               in zip(MixedPrecisionOptimizer(model).master_weights.values(), model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_goes_round_bitwise(name):
    first = net(torch.bfloat16)
    a = MixedPrecisionOptimizer(first, name)
    for step in range(2):
        a.step(draws(first, step), lr=0.1)
    kept = {n: t.clone() for n, t in a.state_dict().items()}
    second = net(torch.bfloat16, seed=1)
    b = MixedPrecisionOptimizer(second, name)
    b.load_state_dict(kept, num_steps=2)
    a.step(draws(first, 2), lr=0.1)
    b.step(draws(second, 2), lr=0.1)
    for p, q in zip(first.parameters(), second.parameters()):
        assert torch.equal(p, q)


def test_frozen_parameters_have_no_state():
    model = net()
    model[0].weight.requires_grad_(False)
    assert not [n for n in MixedPrecisionOptimizer(model).state_dict() if n.endswith("0.weight")]


def test_clip_scales_to_the_limit_and_returns_the_norm():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert unscale_and_clip_grads(grads, 1.0) == pytest.approx(5.0)
    assert grads["a"][0] == pytest.approx(0.6) and grads["b"][0, 0] == pytest.approx(0.8)
    assert unscale_and_clip_grads(grads, 2.0) == pytest.approx(1.0) and grads["b"][0, 0] == pytest.approx(0.8)
    assert unscale_and_clip_grads({"a": torch.tensor([30.0])}, 0) == 30.0


def test_clip_divides_16_bit_gradients_in_float32():
    small = {"a": torch.tensor([2.0**-10], dtype=torch.float16)}
    unscale_and_clip_grads(small, 0, loss_scale=2.0**16)
    assert small["a"].item() == 2.0**-26
    assert unscale_and_clip_grads({"a": torch.full((10_000,), 1024, dtype=torch.float16)},
                                  0) == pytest.approx(102_400)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="adamw and sgd"):
        MixedPrecisionOptimizer(net(), "lion")


@pytest.mark.parametrize("step, progress, want",
                         [(1, 0.0, 0.1), (10, 0.0, 1.0), (99, 0.5, 0.55), (99, 1.0, 0.1)])
def test_rate_rises_in_a_line_and_falls_along_a_cosine_to_a_tenth(step, progress, want):
    assert scheduled_learning_rate(step, progress, warmup_steps=10, peak_lr=1.0) == pytest.approx(want)
    assert scheduled_learning_rate(step, progress, 10, 1.0, "constant") == pytest.approx(min(1, step / 10))
    assert math.isclose(scheduled_learning_rate(1, 0, 0, 3.0, "constant"), 3.0)


def test_a_cosine_ends_where_it_is_told_to():
    assert scheduled_learning_rate(99, 1.0, 10, 1.0, min_lr=0.3) == pytest.approx(0.3)
    assert scheduled_learning_rate(99, 0.5, 10, 1.0, min_lr=0.0) == pytest.approx(0.5)
    assert scheduled_learning_rate(5, 0.0, 10, 1.0, min_lr=0.3) == pytest.approx(0.5)


def test_betas_and_decay_are_those_given():
    optimizer = MixedPrecisionOptimizer(net(), betas=(0.8, 0.99), weight_decay=0.3)
    [group], [vectors] = (optimizer.torch_optimizers[key].param_groups for key in ("matrices", "vectors"))
    assert group["betas"] == vectors["betas"] == (0.8, 0.99)
    assert (group["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
