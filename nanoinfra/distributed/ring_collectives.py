"""Ring all-reduce and its halves from one primitive, `ring_shift`: send to the next rank, take from the last.

A chunk that goes round a ring of n ranks makes n - 1 hops, and every link carries one chunk at any time. So
each rank sends (n-1)/n of the payload in reduce-scatter and in all-gather, and twice that in all-reduce, for
any number of ranks. The CommLog counts every byte.  Patarasuk & Yuan 2009.
"""
import torch

from nanoinfra.distributed.comm import ring_shift
from nanoinfra.distributed.mesh import MeshAxis


def ring_all_reduce(x: torch.Tensor, axis: MeshAxis, tag: str = "") -> torch.Tensor:
    """Sum `x` over the axis, in place. Raises ValueError unless `axis.size` divides the elements of `x`."""
    if x.numel() % axis.size:
        raise ValueError(f"a ring of {axis.size} cuts {x.numel()} elements into {axis.size} equal chunks; "
                         f"pad them to {-(-x.numel() // axis.size) * axis.size}")
    mine = ring_reduce_scatter(x.reshape(axis.size, -1), axis, tag)                    # (numel/N,) finished
    return x.copy_(ring_all_gather(mine, axis, tag).view_as(x))


def ring_reduce_scatter(x: torch.Tensor, axis: MeshAxis, tag: str = "") -> torch.Tensor:
    """Sum `x` (N, ...) over the axis and return row `axis.rank` of the sum: (...).

    Row c starts at rank c + 1, each rank on its way adds its own term, and the sum is complete at rank c.
    """
    n, rank = axis.size, axis.rank
    partial = x[rank - 1]
    for step in range(1, n):
        partial = ring_shift(partial, axis, tag) + x[(rank - 1 - step) % n]
    return partial


def ring_all_gather(x: torch.Tensor, axis: MeshAxis, tag: str = "") -> torch.Tensor:
    """Stack every rank's `x`: (N, *x.shape). Each rank passes on what it received."""
    out = x.new_empty(axis.size, *x.shape)                                             # (N, ...)
    out[axis.rank] = x
    for step in range(1, axis.size):
        x = ring_shift(x, axis, tag)
        out[(axis.rank - step) % axis.size] = x
    return out
