"""Bytes and seconds of collectives.

Payload S is the full tensor's bytes: what all-reduce sums, all-gather returns, reduce-scatter and all-to-all
take. Ring, per rank: all-reduce 2 (n-1)/n S, all-gather, reduce-scatter, all-to-all (n-1)/n S, broadcast S.
Seconds by the alpha-beta model (Hockney 1994): steps * alpha + bytes / beta; `fit` finds both from times.
Rings: Patarasuk & Yuan 2009.  Trees: Thakur, Rabenseifner & Gropp 2005.
"""
from dataclasses import dataclass
from itertools import combinations
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


@dataclass(frozen=True)
class Fit:
    """alpha and beta of a wire that was timed, and by what share the times miss that line."""
    latency: float                           # s a message
    bandwidth: float                         # bytes/s, one direction of a link
    mean_miss: float
    worst_miss: float


def fit(op: str, n: int, seconds: dict[int, float]) -> Fit:
    """The alpha and beta that come closest to the seconds of ring `op` on `n` ranks, by payload.

    Closest: the least sum of relative misses, so a microsecond counts at 4 kB and a wild time bends nothing.
    Such a line goes through two of the points (or one, at alpha = 0), so all of those are tried.
    Raises ValueError where nothing was sent.
    """
    points = [(ring_steps(op, n), ring_bytes(op, payload, n), t) for payload, t in seconds.items()]
    lines = [line for pair in combinations(points, 2) if (line := _through(*pair))]
    lines += [(0.0, t / sent) for _, sent, t in points if sent]
    if not lines:
        raise ValueError(f"{op} on {n} ranks, timed at {list(seconds)} bytes, shows no bandwidth; time two "
                         "sizes or more on two ranks or more")
    alpha, inverse = min(lines, key=lambda line: sum(_misses(points, *line)))
    misses = _misses(points, alpha, inverse)
    return Fit(alpha, 1 / inverse, sum(misses) / len(misses), max(misses))


def _through(a, b):
    """(alpha, 1 / beta) of the line through two points; None unless both make sense."""
    (steps, sent, t), (_, more, longer) = a, b
    inverse = (longer - t) / (more - sent) if more != sent else 0.0
    alpha = (t - sent * inverse) / steps if steps else 0.0
    return (alpha, inverse) if inverse > 0 and alpha >= 0 else None


def _misses(points, alpha, inverse):
    return [abs(steps * alpha + sent * inverse - t) / t for steps, sent, t in points]


def step_bytes(payload: float, ranks: int, servers: int) -> tuple[float, float]:
    """(a server's, a worker's) bytes in one step of a parameter server over its link.

    A rank's link carries both directions at once, so what counts is its busier direction, in push and in
    pull. `payload` is the bytes of the parameters; `servers == ranks` means one server on every worker, which
    sends what an all-reduce sends (Li et al. 2014; Rajbhandari et al. 2020 call it ZeRO-1).
    """
    if servers == ranks:
        both = ring_bytes("reduce_scatter", payload, ranks) + ring_bytes("all_gather", payload, ranks)
        return both, both
    return 2 * payload * (ranks - servers) / servers, 2 * payload


def pull_seconds(payload: float, ranks: int, servers: int, latency: float, bandwidth: float) -> float:
    """Seconds until the last worker has its weights: a server's link sends to one after the other.

    Push takes as long where the receiver's link is the narrow one; distributed/emulated_link.py charges the
    sender's alone.
    """
    if servers == ranks:
        return ring_seconds("all_gather", payload, ranks, latency, bandwidth)
    return (ranks - servers) * (latency + payload / servers / bandwidth)
