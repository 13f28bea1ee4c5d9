"""Objectives plug in from outside: gradients of any loss of -log p by token are one rank's, on every mesh."""
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch, pack_documents
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step
from nanoinfra.lab.instruments.gradient_parity import (
    float64_train_flags,
    largest_gradient_error,
    make_mesh_from_flags,
)
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.train.config import PipelineFlags
from nanoinfra.train.loss import MEAN_CROSS_ENTROPY, MeanCrossEntropy, apply_objective, count_valid_tokens
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage

V, T = 61, 9
ONE = {"pp": 1, "dp": 1, "tp": 1}
MESHES = {"one rank": ({}, "1f1b"), "tp": ({"tp": 2}, "1f1b"), "sp": ({"tp": 2, "sp": True}, "1f1b"),
          "pp": ({"pp": 2}, "1f1b"), "zb-h1": ({"pp": 2}, "zb-h1"), "zero 3": ({"dp": 2, "zero": 3}, "1f1b")}


def config(family="llama", **more):
    return ModelConfig(V, 24, 4, 4, 4 if family in ("gpt2", "bloom") else 2, 6, 40, 16, family=family, **more)


class PreferencePairs:
    """As in DPO: the mean over pairs of -log sigmoid(beta (log p of row 2i - log p of row 2i+1))."""
    beta = 0.1

    def normalizer(self, batch):
        return len(batch.tokens) / 2

    def __call__(self, nll, batch, normalizer_total):
        log_probs = -nll.sum(1)                                            # (B,)
        return -F.logsigmoid(self.beta * (log_probs[::2] - log_probs[1::2])).sum() / normalizer_total


class NoNormalizer:
    def __call__(self, nll, batch, normalizer_total):
        return nll.sum()


class Returns(MeanCrossEntropy):
    """An objective that gives what `function` makes of nll."""

    def __init__(self, function):
        self.function = function

    def __call__(self, nll, batch, normalizer_total):
        return self.function(nll)


def batches(rows=(2, 4, 2, 2), weights=None):
    """Micro-batches of `rows` sequences with 1 to T valid targets; `weights`(random, shape) draws theirs."""
    random, made = torch.Generator().manual_seed(0), []
    for k, B in enumerate(rows):
        x, y = torch.randint(V, (2, B, T), generator=random)
        for i, row in enumerate(y):
            row[1 + (3 * i + k) % T:] = IGNORE_INDEX
        made.append(Batch(x, y, weights(random, (B, T)) if weights else None))
    return made


def fractions(random, shape):
    return torch.rand(shape, generator=random, dtype=torch.float64)


def rank_step(cfg, sizes, schedule, objective, given):
    """One rank's {name: (shard, gradient)}, its share of the loss and its records in a step on `given`."""
    flags = replace(float64_train_flags(ONE | sizes, 1, 1), pipeline=PipelineFlags(schedule))
    mesh = make_mesh_from_flags(flags)
    stage = TrainStage(cfg, flags, mesh, objective=objective)
    mine = given[mesh.data.rank::mesh.data.size]
    _, total = count_valid_tokens(mine, mesh.data, stage.sum_normalizers(mine))
    mesh.comm_log.take_records()
    stage.begin_step(mine, total)
    execute_schedule(stage.build_step_schedule(len(mine))[:-1], stage)
    found = {}
    for name, grad in stage.grads.items():
        shard = stage.parallel_model.optimizer_shard(name)
        found[name] = shard, grad.reshape(-1)[:prod(shard.size)].view(shard.size).clone()
    return {"grads": found, "rows": mesh.comm_log.take_records(),
            "loss": stage.loss.item() * (mesh.tp.rank == 0)}


def nats(model, batch):
    """-log p of each target by plain torch, (B, T)."""
    logits = model(batch.tokens)
    return F.cross_entropy(logits.mT, batch.targets, ignore_index=IGNORE_INDEX, reduction="none")


def plain(cfg, loss_of_model):
    """{name: gradient} and loss of `loss_of_model(model)` in float64, by plain autograd on one rank."""
    model = init_weights(Decoder(cfg, "naive"), seed=0).double()
    loss = loss_of_model(model)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def assert_one_ranks(ranks, mesh, cfg, objective, given, loss_of_model):
    sizes, schedule = MESHES[mesh]
    n = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("dp", 1)
    want, loss = plain(cfg, loss_of_model)
    runs = ranks(n).run(rank_step, cfg, sizes, schedule, objective, given)
    assert largest_gradient_error([run["grads"] for run in runs], want) < 1e-10
    assert sum(run["loss"] for run in runs) == pytest.approx(loss, rel=1e-10)
    return runs


@pytest.mark.parametrize("mesh", MESHES)
def test_an_objective_that_is_not_linear_is_one_ranks(ranks, mesh):
    given, pairs = batches(), PreferencePairs()

    def mean_over_pairs(model):
        gains = [-nats(model, batch).sum(1) for batch in given]            # (B,) each
        losses = [-F.logsigmoid(pairs.beta * (gain[::2] - gain[1::2])) for gain in gains]
        return torch.cat(losses).mean()
    runs = assert_one_ranks(ranks, mesh, config(), pairs, given, mean_over_pairs)
    if mesh in ("tp", "sp"):                                               # it costs no more than the mean
        want = [tp_collectives_per_step(config(), 2, len(batch.tokens), T, 1, 8, 8,
                                        "gather" if mesh == "sp" else "none") for batch in given]
        for run in runs:
            sent = sum(row.payload_bytes for row in run["rows"] if row.tag == "loss")
            assert sent == sum(each["all_reduce", "loss"][1] for each in want)


@pytest.mark.parametrize("mesh", MESHES)
def test_fractional_weights_are_autograds(ranks, mesh):
    given = batches(weights=fractions)

    def weighted_mean(model):
        total = sum((batch.weights * (batch.targets != IGNORE_INDEX)).sum() for batch in given)
        return sum((batch.weights * nats(model, batch)).sum() for batch in given) / total
    assert_one_ranks(ranks, mesh, config("gpt2"), MEAN_CROSS_ENTROPY, given, weighted_mean)


def alone(given, objective=MEAN_CROSS_ENTROPY):
    got = rank_step(config(), {}, "1f1b", objective, given)
    return got["loss"], {name: grad for name, (_, grad) in got["grads"].items()}


def test_weights_of_0_and_1_are_ignored_targets():
    weighted = batches(weights=lambda random, shape: torch.randint(2, shape, generator=random).float())
    ignored = [Batch(x, y.where(weights > 0, IGNORE_INDEX)) for x, y, weights, *_ in weighted]
    assert ignored[0].num_valid_targets < weighted[0].num_valid_targets
    (loss, grads), (want_loss, want) = alone(weighted), alone(ignored)
    assert loss == pytest.approx(want_loss, rel=1e-14)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-14)


def test_weights_of_1_are_none_bit_for_bit():
    given = batches()
    (loss, grads), (want_loss, want) = alone(given), alone([batch._replace(weights=torch.ones(
        batch.tokens.shape)) for batch in given])
    assert loss == want_loss and all(torch.equal(grad, want[name]) for name, grad in grads.items())


@pytest.mark.parametrize("how", ["no weight", "no target"])
def test_an_empty_micro_batch_with_weights_changes_nothing(how):
    given, (empty,) = batches(weights=fractions), batches([1], fractions)
    if how == "no weight":
        empty = empty._replace(weights=torch.zeros(1, T))
    else:
        empty = empty._replace(targets=torch.full((1, T), IGNORE_INDEX))
    assert MEAN_CROSS_ENTROPY.normalizer(empty) == 0
    (loss, grads), (want_loss, want) = alone([*given, empty]), alone(given)
    assert loss == want_loss
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=0, atol=1e-15)
    loss, grads = alone([empty])
    assert loss == 0 and not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("objective, complaint", [
    (NoNormalizer(), r"NoNormalizer has no normalizer; it needs normalizer\(batch\)"),
    (lambda nll: nll.sum(), "<lambda> has no normalizer"), (None, "NoneType has no normalizer")])
def test_an_objective_without_a_normalizer_is_refused_before_anything_runs(objective, complaint):
    with pytest.raises(ValueError, match=complaint):
        TrainStage(config(), float64_train_flags(ONE, 1, 1), Mesh(), objective=objective)


@pytest.mark.parametrize("function, complaint", [
    (lambda nll: nll, r"Returns gives a tensor of shape \(2, 9\); it must give a tensor of shape \(\)"),
    (lambda nll: nll.sum().item(), r"Returns gives \d.*; it must give a tensor"),
    (lambda nll: torch.zeros(()), "does not depend on nll: .* try nll.sum.. \\* 0")])
def test_a_loss_that_is_no_scalar_of_nll_is_refused(function, complaint):
    with pytest.raises(ValueError, match=complaint):
        alone(batches([2]), Returns(function))
    nll = torch.ones(2, T)                                                 # nothing of it is trained
    assert apply_objective(Returns(lambda nll: torch.zeros(())), nll, batches([2])[0], 1) == 0


def test_the_held_out_sum_does_not_depend_on_the_objective():
    flags, given = float64_train_flags(ONE, 1, 1), batches()
    want = TrainStage(config(), flags, Mesh()).sum_held_out_nats(given)
    stage = TrainStage(config(), flags, Mesh(), objective=PreferencePairs())
    assert stage.sum_held_out_nats(given) == want
    model = init_weights(Decoder(config()), seed=0).double()
    with torch.no_grad():
        assert want == pytest.approx(sum(nats(model, batch).sum().item() for batch in given), rel=1e-12)


def test_a_micro_batch_that_is_no_batch_is_refused():
    stage = TrainStage(config(), float64_train_flags(ONE, 1, 1), Mesh())
    x = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="this is a tuple; give Batch"):
        stage.begin_step([(x, x)], 4)
    with pytest.raises(ValueError, match="positions go from 0 to 16; the model's context has 0 to 15"):
        stage.begin_step([Batch(x, x, positions=torch.tensor([0, 1, 2, 16]))], 4)


def test_positions_are_those_of_the_batch():
    """A sequence that begins in the middle, its rows at places of their own."""
    given = batches([2])
    places = torch.arange(T) + torch.tensor([[3], [5]])                    # (B, T)
    for family in ("gpt2", "llama"):
        want, _ = plain(config(family), lambda model: nats(
            lambda x: model(x, positions=places), given[0]).sum() / given[0].num_valid_targets)
        run = rank_step(config(family), {}, "1f1b", MEAN_CROSS_ENTROPY, [given[0]._replace(positions=places)])
        assert largest_gradient_error([run["grads"]], want) < 1e-10


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bloom"])
@pytest.mark.parametrize("mesh", ["one rank", "sp", "pp"])
def test_a_packed_row_is_its_documents_in_rows_of_their_own(ranks, mesh, family):
    random, documents = torch.Generator().manual_seed(3), []
    for length in (7, 5, 8):                                               # 20 tokens, of a context of 16
        s = torch.randint(V, (length + 1,), generator=random)
        documents.append((s[:-1], s[1:]))
    cfg, packed = config(family, **({"window": 4} if family == "mistral" else {})), pack_documents(documents)

    def mean_over_documents(model):
        return torch.cat([nats(model, Batch(x[None], y[None])).flatten() for x, y in documents]).mean()
    assert_one_ranks(ranks, mesh, cfg, MEAN_CROSS_ENTROPY, [packed], mean_over_documents)
