"""Bytes and seconds of collectives.

Payload S is the full tensor's bytes: what all-reduce sums, all-gather returns, reduce-scatter and all-to-all
take. Ring, per rank: all-reduce 2 (n-1)/n S, all-gather, reduce-scatter, all-to-all (n-1)/n S, broadcast S.
Seconds by the alpha-beta model (Hockney 1994): steps * alpha + bytes / beta.
Rings: Patarasuk & Yuan 2009.  Trees: Thakur, Rabenseifner & Gropp 2005.
"""
from math import ceil, log2

_SENT = {                                   # share of the payload that each of n ranks sends
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "exchange": lambda n: 1.0,
    "send": lambda n: 1.0,
    "recv": lambda n: 1.0,
    "barrier": lambda n: 0.0,
}
_STEPS = {
    "all_reduce": lambda n: 2 * (n - 1),
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: n - 1,
    "all_to_all": lambda n: n - 1,
    "broadcast": lambda n: n - 1,
    "exchange": lambda n: 1,
    "send": lambda n: 1,
    "recv": lambda n: 1,
    "barrier": lambda n: n - 1,
}


def ring_bytes(op: str, payload: float, n: int) -> float:
    """Bytes each of `n` ranks sends (for recv: receives) in a ring `op` on `payload` bytes; 0 when n is 1."""
    return payload * _SENT[op](n) if n > 1 else 0.0


def ring_steps(op: str, n: int) -> int:
    """Messages that follow one another in a ring `op` on `n` ranks: each pays the latency once."""
    return _STEPS[op](n) if n > 1 else 0


def ring_seconds(op: str, payload: float, n: int, latency: float, bandwidth: float) -> float:
    """Seconds a ring `op` takes; `latency` in s a message, `bandwidth` in bytes/s a direction of a link."""
    return ring_steps(op, n) * latency + ring_bytes(op, payload, n) / bandwidth


def tree_bytes(payload: float, n: int) -> float:
    """Bytes the busiest rank sends in a binomial-tree all-reduce (reduce, broadcast): log2(n) S, the root."""
    return payload * ceil(log2(n)) if n > 1 else 0.0


def tree_seconds(payload: float, n: int, latency: float, bandwidth: float) -> float:
    """Seconds of a binomial-tree all-reduce: 2 ceil(log2 n) messages of all the payload, one by one."""
    return 2 * ceil(log2(n)) * (latency + payload / bandwidth) if n > 1 else 0.0
