"""Groups of parameters with an optimizer of their own: any rank's shards go as a loop by hand takes them."""
import functools
from itertools import permutations

import pytest
import torch
from torch import nn

from nanoinfra.config import config_for_size
from nanoinfra.data.batch import Batch
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel.pipeline.schedules import gradient_accumulation_schedule
from nanoinfra.train.checkpoint.save_and_load import load_shards, read_checkpoint_state, save_checkpoint
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.optimizer import ADAMW_BETAS, ADAMW_EPS, MixedPrecisionOptimizer, OptimizerGroup
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage, initial_weights_reader

LR, STEPS, CONFIG = 0.05, 3, config_for_size("test")
GROUPS = {"embeddings": OptimizerGroup({"embed.weight"}, lr_scale=0.1, weight_decay=0.0),
          "norms": OptimizerGroup(("norm.weight", "blocks.*.norm?.weight"), optimizer="sgd"),
          "attention": OptimizerGroup(["blocks.*.attn.*"], betas=(0.5, 0.6), lr_scale=2.0),
          "mlp": OptimizerGroup(["blocks.*.mlp.*"], weight_decay=0.3)}
SETTINGS = {"embed": (0.1, ADAMW_BETAS, 0.0), "attn": (2.0, (0.5, 0.6), 0.2), "mlp": (1.0, ADAMW_BETAS, 0.3)}


def update_by_hand(name, p, grad, moments, step):
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) with the settings of the parameter's group, or SGD."""
    if "norm" in name:
        return p - LR * grad
    scale, (beta1, beta2), decay = next(SETTINGS[key] for key in SETTINGS if key in name)
    m, v = moments.get(name, (0, 0))
    m, v = moments[name] = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad.square()
    adam = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + ADAMW_EPS)
    return p * (1 - scale * LR * decay) - scale * LR * adam


def samples(step):
    return torch.randint(CONFIG.vocab, (2, 4, 8), generator=torch.Generator().manual_seed(step))


@functools.cache
def trained_by_hand(steps):
    model, read, moments = Decoder(CONFIG).double(), initial_weights_reader(CONFIG, 0), {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read(name, ()))
    for step in range(1, steps + 1):
        x, y = samples(step)
        model.zero_grad()
        linear_cross_entropy(model.hidden_states(x), model.head.weight, y, y.numel()).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(update_by_hand(name, p, p.grad, moments, step))
    return {name: p.detach() for name, p in model.named_parameters()}


def make_stage(zero):
    n = world_size()
    flags = make_train_flags(dtype="float64", zero=zero, dp=n, clip=0, weight_decay=0.2)
    return TrainStage(CONFIG, flags, Mesh(dp=n), optimizer_groups=GROUPS)


def train_steps(stage, steps):
    data = stage.mesh.data
    for step in steps:
        x, y = (part[data.rank::data.size] for part in samples(step))
        stage.begin_step([Batch(x, y)], 4 * 8, LR)
        execute_schedule(gradient_accumulation_schedule(1), stage)
    return [(shard, tensor.clone()) for shard, tensor in stage.tensor_shards()]


def trained(zero):
    return train_steps(make_stage(zero), range(1, STEPS + 1))


def put_together(every_rank):
    whole = {}
    for shard, tensor in (pair for pairs in every_rank for pair in pairs):
        out = whole.setdefault(shard.name, torch.full(shard.full_shape, torch.nan, dtype=tensor.dtype))
        out[shard.slices_within()] = tensor
    return whole


@pytest.mark.parametrize("zero, n", [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2)])
def test_each_group_goes_its_own_way(ranks, zero, n):
    got, want = put_together(ranks(n).run(trained, zero)), trained_by_hand(STEPS)
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-9, atol=1e-12)
    moments = {name.partition("/")[2] for name in got if "/" in name}
    assert moments == {name for name in want if "norm" not in name}


def saved_and_resumed(folder):
    stage = make_stage(zero=2)
    train_steps(stage, (1, 2))
    save_checkpoint(folder, 2, stage.tensor_shards(), stage.state_dict(), stage.mesh.world)
    want = train_steps(stage, (3,))
    again = make_stage(zero=2)
    step_2 = folder / "step_00000002"
    again.load_state_dict(load_shards(step_2, [shard for shard, _ in again.tensor_shards()]),
                          read_checkpoint_state(step_2))
    got = train_steps(again, (3,))
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(want, got, strict=True))


def test_a_run_with_groups_is_saved_and_goes_on_bitwise_and_on_another_mesh(ranks, tmp_path):
    assert ranks(2).run(saved_and_resumed, tmp_path) == [True, True]
    alone, step_2 = make_stage(zero=0), tmp_path / "step_00000002"
    alone.load_state_dict(load_shards(step_2, [shard for shard, _ in alone.tensor_shards()]),
                          read_checkpoint_state(step_2))
    for name, w in put_together([train_steps(alone, (3,))]).items():
        if "/" not in name:
            torch.testing.assert_close(w, trained_by_hand(3)[name], rtol=1e-9, atol=1e-12)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 4)).to(dtype)


SMALL = {"table": OptimizerGroup(["0.*"], weight_decay=0.0), "norm": OptimizerGroup(["1.*"], optimizer="sgd"),
         "rest": OptimizerGroup({"2.weight", "2.bias"}, lr_scale=0.5), "nobody here": OptimizerGroup(["3.*"])}


def draws(model, step):
    random = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=random).to(p.dtype) for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_groups_step_in_any_order_and_each_without_the_others_gradients(dtype):
    want = net(dtype)
    whole = MixedPrecisionOptimizer(want, groups=SMALL)
    for step in range(2):
        whole.step(draws(want, step), lr=0.1)
    for order in list(permutations(SMALL))[::5]:
        model = net(dtype)
        optimizer = MixedPrecisionOptimizer(model, groups=SMALL)
        for step in range(2):
            for i, group in enumerate(order):
                before = {n: p.clone() for n, p in model.named_parameters()}
                mine = {n: x for n, x in draws(model, step).items() if SMALL[group].contains(n)}
                optimizer.step_group(group, mine, lr=0.1)
                moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
                assert moved <= mine.keys()
                if i < len(order) - 1:
                    with pytest.raises(RuntimeError, match="a step is not finished: .* call step_group for"):
                        _ = optimizer.num_steps
            assert optimizer.num_steps == step + 1
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), want.parameters()))
        states = optimizer.state_dict(), whole.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(x, y) for x, y in zip(*(state.values() for state in states)))


def test_default_groups_are_torchs_two_of_one_optimizer_bit_for_bit():
    ours, theirs = net(), net()
    optimizer = MixedPrecisionOptimizer(ours)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    both = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(both, lr=0.1, betas=ADAMW_BETAS, eps=ADAMW_EPS, fused=True)
    for step in range(3):
        optimizer.step(draws(ours, step), lr=0.1)
        for n, p in theirs.named_parameters():
            p.grad = draws(theirs, step)[n]
        oracle.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert optimizer.param_names == {"matrices": ["0.weight", "2.weight"],
                                     "vectors": ["1.weight", "1.bias", "2.bias"]}


@pytest.mark.parametrize("groups, want", [
    ({"table": SMALL["table"]}, "no optimizer group has 1.weight, 1.bias, 2.weight, 2.bias; there are table"),
    (SMALL | {"biases": OptimizerGroup(["*.bias"])},
     r"have more: 1.bias \(norm, biases\), 2.bias \(rest, biases\); narrow the patterns"),
    ({"all": OptimizerGroup(["*"], optimizer="lion")}, "no optimizer named 'lion'; there are adamw and sgd"),
    ({"all": OptimizerGroup(["*"], "sgd", weight_decay=0.1)}, "betas and weight decay are AdamW's"),
    ({"all": OptimizerGroup(["*"], "sgd", betas=(0.9, 0.99))}, "betas and weight decay are AdamW's"),
])
def test_groups_that_cannot_work_are_refused(groups, want):
    with pytest.raises(ValueError, match=want):
        MixedPrecisionOptimizer(net(), groups=groups)


def test_one_pattern_is_not_taken_for_a_collection_of_letters():
    with pytest.raises(ValueError, match=r"write \('0\.\*',\)"):
        OptimizerGroup("0.*")
