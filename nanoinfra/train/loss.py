"""The loss, normalised once: the sum over this rank's targets / the valid targets of the whole step.

Gradients then only need summing, over micro-batches and over ranks. The product with the head and the softmax
are one function, parallel/vocab_parallel.py's.
B sequences, T tokens, C width, V vocabulary.
"""
import torch

from nanoinfra.data.sample_order import IGNORE
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import alone
from nanoinfra.parallel import vocab_parallel
from nanoinfra.parallel.tensor_parallel import Whole


def count_valid(micro_batches, axis, *flags: int) -> list[int]:
    """[valid targets of the whole step on all ranks, *flags summed]: the one integer all-reduce of a step."""
    valid = sum(int((y != IGNORE).sum()) for _, y in micro_batches)
    return comm.all_reduce(torch.tensor([valid, *flags]), axis, "scalars").tolist()


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                  count: int) -> torch.Tensor:
    """-sum log p(target) / count, over targets that are not IGNORE; softmax in at least float32.

    `hidden` (B, T, C) is what the head reads, `weight` (V, C) the whole head's, `targets` (B, T).
    Returns () in the wide dtype: this rank's share of the step's mean loss.
    """
    return vocab_parallel.cross_entropy(hidden, weight, targets, count, Whole(alone("tp")), 0)
