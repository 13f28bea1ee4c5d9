"""The cross-entropy loss, normalised once: this rank's sum over targets / valid targets of the whole step.

Gradients then only need summing, over micro-batches (gradient accumulation) and over ranks. The product with
the output head and the softmax are one function, that of parallel/vocab_parallel.py.
B sequences, T tokens, C width, V vocabulary.
"""
import torch

from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import single_rank_axis
from nanoinfra.parallel import vocab_parallel
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion


def count_valid_tokens(micro_batches, axis, *more_counts: int) -> list[int]:
    """Sum the valid targets of the step over all ranks, in the step's one integer all-reduce.

    `micro_batches` are this rank's (x, y). Returns [valid targets, *more_counts], each summed over `axis`.
    """
    valid = sum(int((y != IGNORE_INDEX).sum()) for _, y in micro_batches)
    return comm.all_reduce(torch.tensor([valid, *more_counts]), axis, "scalars").tolist()


def linear_cross_entropy(hidden: torch.Tensor, head_weight: torch.Tensor, targets: torch.Tensor,
                         num_valid_tokens: int) -> torch.Tensor:
    """-sum log p(target) / num_valid_tokens over targets other than IGNORE_INDEX; softmax in >= float32.

    `hidden` (B, T, C) are the hidden states that the head reads, `head_weight` (V, C) is the whole head's
    weight, `targets` (B, T). Returns () in the wide dtype: this rank's share of the step's mean loss.
    """
    return vocab_parallel.vocab_parallel_cross_entropy(hidden, head_weight, targets, num_valid_tokens,
                                                       TensorParallelRegion(single_rank_axis("tp")), 0)
