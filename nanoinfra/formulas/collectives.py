"""Collectives: the bytes that each rank sends, and their seconds by the alpha-beta model.

The payload S is the full tensor's bytes: all-reduce sums it, all-gather returns it, reduce-scatter and
all-to-all take it. In a ring each of n ranks sends 2 (n-1)/n S for an all-reduce, (n-1)/n S for all-gather,
reduce-scatter and all-to-all, S for a broadcast. Seconds are steps * alpha + bytes / beta (Hockney 1994).
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
    "ring_shift": lambda n: 1.0,
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
    "ring_shift": lambda n: 1,
    "send": lambda n: 1,
    "recv": lambda n: 1,
    "barrier": lambda n: n - 1,
}


def ring_bytes_per_rank(op: str, payload_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends (for recv: receives) in a ring collective `op`; 0 on a single rank."""
    return payload_bytes * _SENT[op](ranks) if ranks > 1 else 0.0


def ring_steps(op: str, ranks: int) -> int:
    """Messages of a ring collective `op` that follow one another; each of them pays the latency once."""
    return _STEPS[op](ranks) if ranks > 1 else 0


def ring_collective_seconds(op: str, payload_bytes: float, ranks: int, latency: float,
                            bandwidth: float) -> float:
    """Seconds of a ring collective `op`; `latency` in s a message, `bandwidth` in bytes/s a direction."""
    return ring_steps(op, ranks) * latency + ring_bytes_per_rank(op, payload_bytes, ranks) / bandwidth


def tree_all_reduce_seconds(payload_bytes: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of a binomial-tree all-reduce: 2 ceil(log2 n) messages of all the payload, one by one."""
    return 2 * ceil(log2(ranks)) * (latency + payload_bytes / bandwidth) if ranks > 1 else 0.0


@dataclass(frozen=True)
class LatencyBandwidthFit:
    """Latency (alpha) and bandwidth (beta) fitted to measured seconds, and the relative errors of the fit."""
    latency: float                           # s a message
    bandwidth: float                         # bytes/s, one direction of a link
    mean_relative_error: float
    max_relative_error: float


def fit_latency_bandwidth(op: str, ranks: int, seconds_by_payload: dict[int, float]) -> LatencyBandwidthFit:
    """Fit latency and bandwidth to the measured seconds of the ring collective `op`, by payload bytes.

    The fit has the least sum of relative errors, so that a microsecond counts at 4 kB and an outlier bends
    nothing. Such a line goes through two of the points (or through one, at alpha = 0), so all of these lines
    are tried. Raises ValueError where nothing was sent.
    """
    points = [(ring_steps(op, ranks), ring_bytes_per_rank(op, payload_bytes, ranks), seconds)
              for payload_bytes, seconds in seconds_by_payload.items()]
    lines = [line for pair in combinations(points, 2) if (line := _through(*pair))]
    lines += [(0.0, t / sent) for _, sent, t in points if sent]
    if not lines:
        raise ValueError(f"{op} on {ranks} ranks, timed at {list(seconds_by_payload)} bytes, shows no "
                         "bandwidth; time two sizes or more on two ranks or more")
    alpha, inverse = min(lines, key=lambda line: sum(_relative_errors(points, *line)))
    errors = _relative_errors(points, alpha, inverse)
    return LatencyBandwidthFit(alpha, 1 / inverse, sum(errors) / len(errors), max(errors))


def _through(a, b):
    """(alpha, 1 / beta) of the line through two points; None unless both make sense."""
    (steps, sent, t), (_, more, longer) = a, b
    inverse = (longer - t) / (more - sent) if more != sent else 0.0
    alpha = (t - sent * inverse) / steps if steps else 0.0
    return (alpha, inverse) if inverse > 0 and alpha >= 0 else None


def _relative_errors(points, alpha, inverse):
    return [abs(steps * alpha + sent * inverse - t) / t for steps, sent, t in points]


def parameter_server_step_bytes(payload_bytes: float, ranks: int, servers: int) -> tuple[float, float]:
    """Bytes in one step of a parameter server over (a server's link, a worker's link).

    A rank's link carries both directions at once, so the busier direction counts, in push and in pull.
    `payload_bytes` is the bytes of the weights. `servers == ranks` means a server on every worker, which
    together send as much as an all-reduce (Li et al. 2014; Rajbhandari et al. 2020 call it ZeRO-1).
    """
    if servers == ranks:
        push = ring_bytes_per_rank("reduce_scatter", payload_bytes, ranks)
        pull = ring_bytes_per_rank("all_gather", payload_bytes, ranks)
        return push + pull, push + pull
    return 2 * payload_bytes * (ranks - servers) / servers, 2 * payload_bytes


def parameter_server_pull_seconds(payload_bytes: float, ranks: int, servers: int, latency: float,
                                  bandwidth: float) -> float:
    """Seconds until the last worker has pulled the weights: a server's link sends to one after the other.

    A push takes as long where the receiver's link is the narrow one; the emulated link charges the sender's.
    """
    if servers == ranks:
        return ring_collective_seconds("all_gather", payload_bytes, ranks, latency, bandwidth)
    return (ranks - servers) * (latency + payload_bytes / servers / bandwidth)
