"""Time an axis of the mesh: seconds of an all-reduce, or of a message, by payload.

Calls follow one another without a pause, and the slowest rank's time counts. All lines of the axis work at
once, as in training. `fit` of formulas/collectives.py makes alpha and beta of the times (Hockney 1994).
"""
import time
from functools import partial
from statistics import median

import torch

from nanoinfra.distributed import comm

SIZES = tuple(4096 * 4 ** k for k in range(8))   # bytes: 4 KiB to 64 MiB
SAMPLE = 5e-3                                # s that a sample lasts at least
TOO_LONG = 0.3                               # s that a call may last; nothing larger is tried, but two sizes,
                                             #   since a line goes through two points


def wire_times(mesh, axis, op: str = "all_reduce", rounds: int = 7) -> dict[int, list[float]]:
    """{payload bytes: seconds of one `op`, `rounds` times}, alike on every rank; `op`: all_reduce or send.

    A send is timed there and back between neighbours, and halved. Every rank of the mesh calls it.
    """
    times = {}
    for size in SIZES:
        x = torch.zeros(size // 4, device=mesh.device)
        call = partial(_CALLS[op], x, axis)
        _sample(mesh, call, 2)                                   # buffers are made, connections are opened
        calls = max(1, min(100, round(SAMPLE / _sample(mesh, call, 2))))
        times[size] = [_sample(mesh, call, calls) / _TRIPS[op] for _ in range(rounds)]
        if len(times) > 1 and 4 * _TRIPS[op] * median(times[size]) > TOO_LONG:
            break                                                # the next size has four times the bytes
    return times


def matmul_rate(mesh, dtype: torch.dtype, rounds: int = 7) -> list[float]:
    """FLOP/s of one rank's device while all ranks multiply n x n matrices, `rounds` times, at the best n."""
    best = [0.0]
    for n in (4096, 8192, 16384) if mesh.device == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(2, n, n, device=mesh.device).to(dtype)
        call = partial(torch.matmul, a, b)
        once = _sample(mesh, call, 1)
        rates = [2 * n ** 3 / _sample(mesh, call, 1) for _ in range(rounds)]
        best = max(best, rates, key=median)
        if 8 * once > TOO_LONG:
            break                                                # twice the n, eight times the work
    return best


def _sample(mesh, call, calls):
    """Seconds of one call, of `calls` in a row, on the slowest rank."""
    comm.barrier(mesh.world, "probe")
    _finish(mesh)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _finish(mesh)
    took = torch.tensor((time.perf_counter() - begin) / calls, dtype=torch.float64)
    return comm.all_reduce(took, mesh.world, "probe", op="max").item()


def _finish(mesh):
    if mesh.device == "cuda":
        torch.cuda.synchronize()             # a call only queues work there


def _there_and_back(x, axis):
    partner = axis.rank ^ 1
    if partner >= axis.size:
        return                               # the last of an odd number
    for mine in (axis.rank, partner):        # the even one speaks first
        if mine % 2 == 0:
            comm.send(x, axis, partner, "probe")
        else:
            comm.recv(x, axis, partner, "probe")


_CALLS = {"all_reduce": partial(comm.all_reduce, tag="probe"), "send": _there_and_back}
_TRIPS = {"all_reduce": 1, "send": 2}
