"""Bytes and seconds of a parameter server: who is busiest, and for how long.

A rank's link carries both directions at once, so what counts is its busier direction, in push and in pull.
With one server that is 2 Psi W, with S of them 2 Psi W / S, and with one on each of N workers 2 (N-1)/N Psi,
an all-reduce's. Li et al. 2014; Rajbhandari et al. 2020 call the last ZeRO-1. `payload`: bytes of Psi.
"""
from nanoinfra.formulas.wire import ring_bytes, ring_seconds


def step_bytes(payload: float, ranks: int, servers: int) -> tuple[float, float]:
    """(a server's, a worker's) bytes in one step over its link. `servers == ranks`: one on every worker."""
    if servers == ranks:
        both = ring_bytes("reduce_scatter", payload, ranks) + ring_bytes("all_gather", payload, ranks)
        return both, both
    return 2 * payload * (ranks - servers) / servers, 2 * payload


def pull_seconds(payload: float, ranks: int, servers: int, latency: float, bandwidth: float) -> float:
    """Seconds until the last worker has its weights: a server's link sends to one after the other.

    Push takes as long where the receiver's link is the narrow one; dist/link.py charges the sender's alone.
    """
    if servers == ranks:
        return ring_seconds("all_gather", payload, ranks, latency, bandwidth)
    return (ranks - servers) * (latency + payload / servers / bandwidth)
