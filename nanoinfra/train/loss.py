"""The loss in two halves: the head gives -log p of each target, an objective makes the step's loss of these.

What the step's loss is divided by is known before any backward, over all micro-batches and ranks: gradients
then only need summing, over micro-batches (gradient accumulation) and over ranks. The default objective is
the mean cross-entropy; another one (a preference loss, a clipped policy gradient) is an argument of
TrainStage. The head and the softmax are one function, that of parallel/vocab_parallel.py.
B sequences, T tokens, C width, V vocabulary.
"""
from collections.abc import Iterable
from typing import Protocol

import torch

from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis, single_rank_axis
from nanoinfra.parallel import vocab_parallel
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion


class Objective(Protocol):
    """What a step minimises, as a function of -log p of each target; it is the same on all ranks."""

    def normalizer(self, batch: Batch) -> float:
        """This micro-batch's share of what the step's loss is divided by, such as its number of targets."""

    def __call__(self, nll: torch.Tensor, batch: Batch, normalizer_total: float) -> torch.Tensor:
        """This micro-batch's share of the step's loss, ().

        `nll` (B, T) is -log p of each target, 0 where it is ignored. `normalizer_total` is the sum of all
        micro-batches' normalizers, over all ranks. The losses of all micro-batches and ranks add up to the
        step's.
        """


class MeanCrossEntropy:
    """The mean of -log p over the step's valid targets, weighted where the batches have weights."""

    def normalizer(self, batch: Batch) -> float:
        """The sum of the weights of the valid targets: without weights, their number."""
        if batch.weights is None:
            return batch.num_valid_targets
        return batch.weights[batch.targets != IGNORE_INDEX].sum(dtype=torch.float64).item()

    def __call__(self, nll: torch.Tensor, batch: Batch, normalizer_total: float) -> torch.Tensor:
        """The weighted sum of `nll` (B, T) over `normalizer_total`: () in the dtype of `nll`."""
        weighted = nll if batch.weights is None else nll * batch.weights             # (B, T)
        return _sum_over(weighted, normalizer_total).to(nll.dtype)


MEAN_CROSS_ENTROPY = MeanCrossEntropy()


def check_objective(objective: Objective) -> None:
    """Raise ValueError for an objective that has no `normalizer` or cannot be called."""
    for name in ("normalizer", "__call__"):
        if not callable(getattr(objective, name, None)):
            raise ValueError(f"the objective {_name(objective)} has no {name}; it needs normalizer(batch) "
                             "and __call__(nll, batch, normalizer_total), as MeanCrossEntropy has")


def apply_objective(objective: Objective, nll: torch.Tensor, batch: Batch,
                    normalizer_total: float) -> torch.Tensor:
    """Return the objective's loss () of `nll` (B, T).

    Raises ValueError where it is no scalar, or where no gradient reaches `nll` through it: then this rank
    would run no backward, and others would wait for it.
    """
    loss = objective(nll, batch, normalizer_total)
    if not isinstance(loss, torch.Tensor) or loss.shape != ():
        kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise ValueError(f"the objective {_name(objective)} gives {kind}; it must give a tensor of shape (), "
                         "this micro-batch's share of the step's loss: sum, and divide by normalizer_total")
    if nll.requires_grad and not loss.requires_grad:
        raise ValueError(f"the objective {_name(objective)} gives a loss that does not depend on nll: this "
                         "micro-batch would have no backward; where it learns nothing, try nll.sum() * 0")
    return loss


def count_valid_tokens(micro_batches: Iterable[Batch], axis: MeshAxis, *more_numbers: float) -> list[float]:
    """Sum the valid targets of the step over all ranks, in the step's one all-reduce of counts.

    `micro_batches` are this rank's. Returns [valid targets, *more_numbers], each summed over `axis` in
    float64, which is exact for counts; the first is an int.
    """
    valid = sum(batch.num_valid_targets for batch in micro_batches)
    numbers = torch.tensor([valid, *more_numbers], dtype=torch.float64)
    total, *more_totals = comm.all_reduce(numbers, axis, "scalars").tolist()
    return [int(total), *more_totals]


def linear_cross_entropy(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor,
                         num_valid_tokens: int) -> torch.Tensor:
    """-sum log p(target) / num_valid_tokens over targets other than IGNORE_INDEX; softmax in >= float32.

    `hidden` (B, T, C) are the hidden states that the head reads, `head_weight` (V, C) is the whole head's
    weight, `targets` (B, T). Returns () in the wide dtype: this rank's share of the step's mean loss.
    """
    region = TensorParallelRegion(single_rank_axis("tp"))
    nll = vocab_parallel.vocab_parallel_cross_entropy(hidden, head_weight, targets, region, 0)    # (B, T)
    return _sum_over(nll, num_valid_tokens).to(nll.dtype)


def _sum_over(x, total):
    """The sum of `x` in float64, over `total`; a step without valid targets sums zeros."""
    return x.sum(dtype=torch.float64) / (total or 1)


def _name(objective):
    return getattr(objective, "__name__", type(objective).__name__)
