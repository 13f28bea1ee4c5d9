"""Recompute: the same gradients, the same random numbers, and each block's forward twice."""
import copy
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.memory import recompute
from nanoinfra.model import attention
from nanoinfra.model.decoder import Decoder, DecoderBlock
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.train.loss import linear_cross_entropy
from tests.families import KINDS
from tests.parity import assert_same_gradients

CASES = [("naive", "selective"), ("naive", "full"), ("sdpa", "full")]


def config(family="llama"):
    return ModelConfig(61, 24, 3, 4, 2, 10, 40, 16, family=family)


def decoder(attention="sdpa", how="none", family="llama"):
    model = init_weights(Decoder(config(family), attention), seed=3).double()
    return recompute.apply_activation_checkpointing(model, how)


def gradients(model, micro_batches=2):
    """{name: gradient} of those that train, over micro-batches of two sequences."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(micro_batches):
        tokens = torch.randint(61, (2, 11), generator=draw)
        linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens,
                             22 * micro_batches).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("attention, how", CASES)
def test_recompute_matches_plain(family, attention, how):
    want = gradients(decoder(attention, family=family))
    assert_same_gradients(gradients(decoder(attention, how, family)), want)


@pytest.mark.parametrize("how, blocks, cores", [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)])
def test_forward_calls(monkeypatch, how, blocks, cores):
    calls = {"block": 0, "core": 0}

    def counting(name, fn):
        @functools.wraps(fn)
        def count(*args):
            calls[name] += 1
            return fn(*args)
        return count
    monkeypatch.setattr(DecoderBlock, "forward", counting("block", DecoderBlock.forward))
    monkeypatch.setitem(attention.ATTENTION_CORES, "naive", counting("core", attention.naive_attention))
    gradients(decoder("naive", how), micro_batches=2)
    assert calls == {"block": 2 * 3 * blocks, "core": 2 * 3 * cores}


class Noisy(nn.Module):
    """A foreign model whose blocks draw random numbers."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3))
        recompute.apply_activation_checkpointing(self, how)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def noisy_step(how):
    """(gradients, random numbers drawn before, between and after forward and backward)."""
    model, x = Noisy(how), torch.ones(5, 6)
    torch.manual_seed(0)
    drawn = [torch.rand(3)]
    loss = model(x).square().sum()
    drawn.append(torch.rand(3))
    loss.backward()
    return [p.grad for p in model.parameters()], [*drawn, torch.rand(3)]


def test_random_numbers_are_drawn_again_and_the_stream_goes_on_as_without():
    (want, stream), (got, other) = noisy_step("none"), noisy_step("full")
    assert all(map(torch.equal, got, want)) and all(map(torch.equal, stream, other))
    assert any((grad == 0).any() for grad in want)                             # dropout did drop


@pytest.mark.gpu
def test_a_gpus_dice_fall_again_too():
    results = []
    for call in (lambda fn, x: fn(x), recompute.activation_checkpoint):
        torch.manual_seed(0)
        x = torch.ones(64, device="cuda", requires_grad=True)
        y = call(lambda x: torch.dropout(x, 0.5, True) * x, x)
        between = torch.rand(3, device="cuda")
        y.sum().backward()
        results.append(torch.cat([x.grad, between, torch.rand(3, device="cuda")]))
    assert torch.equal(*results)


def test_parameters_get_gradients_though_no_input_needs_one():
    model = Noisy("full").eval()
    assert not torch.ones(5, 6).requires_grad
    model(torch.ones(5, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = decoder("sdpa", "full")
    frozen.embed.weight.requires_grad_(False)
    plain = decoder("sdpa")
    plain.embed.weight.requires_grad_(False)
    assert_same_gradients(gradients(frozen), gradients(plain))


def test_frozen_blocks_pass_gradients_on():
    want, got = decoder("sdpa"), decoder("sdpa", "full")
    for model in (want, got):
        model.blocks[1].requires_grad_(False)
        model.blocks[2].mlp.requires_grad_(False)
    assert_same_gradients(gradients(got), gradients(want))
    assert all(p.grad is None for p in got.blocks[1].parameters())


def test_what_is_frozen_all_through_gives_nothing():
    layer = nn.Linear(3, 3).requires_grad_(False)
    (recompute.activation_checkpoint(layer, torch.ones(3)).sum()
     + torch.ones((), requires_grad=True)).backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("how", ["none", "full"])
def test_a_block_used_twice_adds_up(how):
    model = decoder("naive", "none")
    model.blocks[2] = model.blocks[0]
    plain = copy.deepcopy(model)
    model.blocks = model.blocks[:2]                                            # one wrapper a block
    recompute.apply_activation_checkpointing(model, how)
    model.blocks.append(model.blocks[0])
    assert_same_gradients(gradients(model), gradients(plain))


def test_a_copy_recomputes_itself():
    """deepcopy must not leave the copy's forward with the original's weights."""
    first = decoder("naive", "full")
    second = copy.deepcopy(first)
    gradients(second)
    assert all(p.grad is None for p in first.parameters())


def test_tensors_in_tuples_lists_and_dicts_and_everything_else_pass():
    def fn(x, rope, options, name, none):
        assert name == "name" and none is None and options["n"] == 2
        return x * rope[0] + options["more"][0] * rope[1][0], x.sum()
    leaves = [torch.randn(3, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(4)]
    args = leaves[0], (leaves[1], [leaves[2].detach()]), {"more": [leaves[3]], "n": 2}, "name", None
    results = []
    for call in (fn, functools.partial(recompute.activation_checkpoint, fn)):
        y, total = call(*args)
        results.append(torch.autograd.grad((y.square().sum() * total), (leaves[0], leaves[1], leaves[3])))
    assert all(map(torch.equal, *results))


def test_a_second_backward_fails_as_torchs_own_does():
    x, layer = torch.ones(3, requires_grad=True), nn.Linear(3, 3)
    y = recompute.activation_checkpoint(layer, x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_gradients_of_gradients_are_refused_not_wrong():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="not gradients of gradients"):
        torch.autograd.grad(recompute.activation_checkpoint(torch.exp, x).sum(), x, create_graph=True)


def test_without_grad_nothing_is_kept_and_nothing_runs_twice():
    model = decoder("naive", "full")
    with torch.no_grad():
        out = model.hidden_states(torch.zeros(1, 4, dtype=torch.long))
    assert not out.requires_grad


def test_hooks_of_a_block_fire_in_the_first_forward_alone():
    model, seen = decoder("sdpa", "full"), []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: seen.append(f"in {i}"))
        block.register_forward_hook(lambda _, __, out, i=i: out.register_hook(
            lambda grad, i=i: seen.append(f"back {i}")) and None)
    gradients(model, micro_batches=1)
    assert seen == ["in 0", "in 1", "in 2", "back 2", "back 1", "back 0"]


def test_a_parameters_gradient_arrives_when_its_block_is_done():
    model, seen = decoder("sdpa", "full"), []
    for name, p in model.blocks.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_pre_hook(lambda *_, i=i: seen.append(f"{i} runs"))
    gradients(model, micro_batches=1)
    block = [f"{name}" for name, _ in model.blocks[0].named_parameters()]
    assert seen[:3] == ["0 runs", "1 runs", "2 runs"]
    for i, part in zip("210", (seen[3:][k * (1 + len(block)):][:1 + len(block)] for k in range(3))):
        assert part[0] == f"{i} runs" and sorted(part[1:]) == sorted(f"{i}.{name}" for name in block)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_under_data_parallelism_it_matches_one_rank(ranks, how):
    want = gradients(decoder("naive"), micro_batches=4)
    for rank, got in enumerate(ranks(2).run(shared_gradients, how)):
        assert_same_gradients(got, want, where=f"rank {rank} of 2")


def shared_gradients(how):
    mesh = Mesh(dp=2)
    model = decoder("naive", how)
    shared = DataParallel(model, mesh.data, "overlap", bucket_bytes=10_000)
    assert len(shared.buckets) > 3
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randint(61, (2, 11), generator=draw) for _ in range(4)][mesh.dp.rank::2]
    for i, tokens in enumerate(batches):
        shared.prepare_for_backward(is_last=i == 1)
        linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 88).backward()
    return {name: grad.clone() for name, grad in shared.finish_grad_sync().items()}


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_it_runs_again_under_the_same_autocast(inside):
    """A weight's cast made without grad must not be found again by the second run."""
    got, want = ([], [])
    for call, grads in ((recompute.activation_checkpoint, got), (lambda fn, *args: fn(*args), want)):
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(call(layer, torch.ones(2, 4))).float().square().sum()    # used outside as well
            y.backward() if inside else None
        None if inside else y.backward()
        grads.append(layer.weight.grad)
    assert torch.allclose(got[0], want[0], rtol=1e-2)                          # two bf16 sums instead of one


@pytest.mark.parametrize("how, complaint", [
    ("half", "recompute is one of none, selective, full, not 'half'"),
    ("selective", "sdpa keeps none, so there is nothing to save; try --attention naive, or --recompute f")])
def test_what_cannot_be_is_refused(how, complaint):
    with pytest.raises(ValueError, match=complaint):
        recompute.apply_activation_checkpointing(decoder("sdpa"), how)


def test_none_changes_nothing():
    model = Decoder(config_for_size("test"))
    assert recompute.apply_activation_checkpointing(model, "none") is model
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.prove
def test_lifted_alone_it_trains_a_foreign_module(tmp_path):
    shutil.copy(Path(recompute.__file__), tmp_path)
    (tmp_path / "train.py").write_text(FOREIGN)
    argv = [sys.executable, "-W", "error", "train.py"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "fell"]


FOREIGN = """
import sys

import torch
from torch import nn

from recompute import activation_checkpoint

def train(call):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 5))
    head = nn.Linear(5, 3)
    sgd = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    x, y, losses = torch.randn(64, 5), torch.arange(64) % 3, []
    for step in range(20):
        loss = nn.functional.cross_entropy(head(call(body, x)), y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        losses.append(loss.item())
    return losses

assert not any(name.startswith("nanoinfra") for name in sys.modules)
got, want = train(activation_checkpoint), train(lambda fn, *args: fn(*args))
print("same" if got == want else "different")
print("fell" if got[-1] < got[0] else "rose")
"""
