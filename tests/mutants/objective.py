"""Known-wrong losses: right for the plain mean of one full batch, wrong where tokens weigh differently."""
from functools import partial

import torch
import torch.nn.functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.instruments.gradient_parity import (
    float64_train_flags,
    largest_gradient_error,
    make_mesh_from_flags,
)
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.parallelize import ParallelChunk
from nanoinfra.train.loss import MeanCrossEntropy, apply_objective, count_valid_tokens
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage

CONFIG = ModelConfig(61, 16, 2, 2, 1, 8, 24, 16)
T = 9
objective = Check("objective")


@objective.criterion("the weighted mean is autograd's", "parity")
def _(subject):
    given = [weighted(batch) for batch in batches()]

    def mean(model):
        total = sum((batch.weights * (batch.targets != IGNORE_INDEX)).sum() for batch in given)
        return sum((batch.weights * nats(model, batch)).sum() for batch in given) / total
    compare(subject, given, mean)


@objective.criterion("positions are the batch's", "parity")
def _(subject):
    given = [batch._replace(positions=torch.arange(T) + 5 - torch.arange(T) // 4 * 3) for batch in batches()]

    def mean(model):
        return (sum(nats(model, batch).sum() for batch in given)
                / sum(batch.num_valid_targets for batch in given))
    compare(subject, given, mean)


def compare(subject, given, loss_of_model):
    model = init_weights(Decoder(CONFIG), seed=0).double()
    loss_of_model(model).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    for dp in (1, 2):
        off = largest_gradient_error(rank_pool_for_checks(dp).run(subject, dp, given), want)
        if not off < 1e-10:
            raise CriterionNotMet(f"on {dp} data ranks a gradient is off by {off:.1e} of its size")


def nats(model, batch):
    logits = model(batch.tokens, positions=batch.positions)
    return F.cross_entropy(logits.mT, batch.targets, ignore_index=IGNORE_INDEX, reduction="none")


def batches():
    """Four micro-batches of two sequences, with 1 to T valid targets."""
    x, y = torch.randint(CONFIG.vocab, (2, 8, T), generator=torch.Generator().manual_seed(0))
    for i, row in enumerate(y):
        row[1 + 3 * i % T:] = IGNORE_INDEX
    return list(map(Batch, x.split(2), y.split(2)))


def weighted(batch):
    weights = torch.rand(2, T, generator=torch.Generator().manual_seed(int(batch.tokens.sum())))
    return batch._replace(weights=weights.double())


def step(dp, given, objective=None):
    """One rank's {name: (shard, gradient)} of a step on its share of the micro-batches `given`."""
    flags = float64_train_flags({"pp": 1, "dp": dp, "tp": 1}, 1, 1)
    mesh = make_mesh_from_flags(flags)
    stage = TrainStage(CONFIG, flags, mesh, objective=objective or MeanCrossEntropy())
    mine = given[mesh.data.rank::dp]
    _, total = count_valid_tokens(mine, mesh.data, stage.sum_normalizers(mine))
    stage.begin_step(mine, total)
    execute_schedule(stage.build_step_schedule(len(mine))[:-1], stage)
    return {name: (stage.parallel_model.optimizer_shard(name), grad.clone())
            for name, grad in stage.grads.items()}


def one_factor_for_all_rows(x, factors, out):
    return torch.mul(x, factors.mean(), out=out)


def divides_by_its_own_weights(objective, nll, batch, normalizer_total):
    return apply_objective(objective, nll, batch, 4 * objective.normalizer(batch))


class CountsIgnoredTargets(MeanCrossEntropy):
    def normalizer(self, batch):
        return batch.num_valid_targets if batch.weights is None else batch.weights.sum().item()


class CountsTargets(MeanCrossEntropy):
    def normalizer(self, batch):
        return batch.num_valid_targets


class CountsPositionsItself(ParallelChunk):
    def _positions(self, batch):
        return self.model.default_positions(batch.tokens)


WEIGHTS, POSITIONS = (criterion.name for criterion in objective.criteria)
MUTANTS = [
    Mutant("one factor for all rows", objective,
           patched(step, "nanoinfra.parallel.vocab_parallel:_multiply_rows", one_factor_for_all_rows),
           WEIGHTS),
    Mutant("micro-batches divide by their own weights", objective,
           patched(step, "nanoinfra.train.training_pipeline_stage:apply_objective",
                   divides_by_its_own_weights), WEIGHTS),
    Mutant("weights of ignored targets count", objective,
           partial(step, objective=CountsIgnoredTargets()), WEIGHTS),
    Mutant("divides by targets where weights are given", objective,
           partial(step, objective=CountsTargets()), WEIGHTS),
    Mutant("positions count from 0 whatever the batch says", objective,
           patched(step, "nanoinfra.parallel.parallelize:ParallelChunk", CountsPositionsItself), POSITIONS),
]
