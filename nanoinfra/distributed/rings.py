"""Collectives by hand, from one primitive: give to the right neighbour, take from the left.

A chunk that goes round a ring of n ranks makes n - 1 hops, and every link carries one at any time. So each
rank sends (n-1)/n of the payload in reduce-scatter and in all-gather, twice that in all-reduce: less than one
(two) payloads, however many ranks there are. The ledger counts every byte.  Patarasuk & Yuan 2009.
"""
import torch

from nanoinfra.distributed.comm import exchange


def ring_all_reduce(x: torch.Tensor, axis, tag: str = "") -> torch.Tensor:
    """Sum `x` over the axis, in place. Raises ValueError unless `axis.size` divides the elements of `x`."""
    if x.numel() % axis.size:
        raise ValueError(f"a ring of {axis.size} cuts {x.numel()} elements into {axis.size} equal chunks; "
                         f"pad them to {-(-x.numel() // axis.size) * axis.size}")
    mine = ring_reduce_scatter(x.reshape(axis.size, -1), axis, tag)                    # (numel/N,) finished
    return x.copy_(ring_all_gather(mine, axis, tag).view_as(x))


def ring_reduce_scatter(x: torch.Tensor, axis, tag: str = "") -> torch.Tensor:
    """Sum `x` (N, ...) over the axis and keep row `axis.rank`: (...).

    Row c sets out at rank c + 1, gathers a term at every stop, and is complete where it belongs: at rank c.
    """
    n, rank = axis.size, axis.rank
    partial = x[rank - 1]
    for step in range(1, n):
        partial = exchange(partial, axis, tag) + x[(rank - 1 - step) % n]
    return partial


def ring_all_gather(x: torch.Tensor, axis, tag: str = "") -> torch.Tensor:
    """Every rank's `x`, stacked: (N, *x.shape). What came from the left is passed on to the right."""
    out = x.new_empty(axis.size, *x.shape)                                             # (N, ...)
    out[axis.rank] = x
    for step in range(1, axis.size):
        x = exchange(x, axis, tag)
        out[(axis.rank - step) % axis.size] = x
    return out
