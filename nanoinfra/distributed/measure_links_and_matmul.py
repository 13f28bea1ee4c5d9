"""Benchmarks: seconds of an all-reduce or a message by payload, and FLOP/s of a matrix product.

Calls follow one another without a pause, and the slowest rank's time counts. All groups of the axis
communicate at once, as in training. formulas/collectives.py fits latency and bandwidth (Hockney 1994).
"""
import time
from functools import partial
from statistics import median

import torch

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, MeshAxis

_PAYLOAD_SIZES_BYTES = tuple(4096 * 4 ** k for k in range(8))            # 4 KiB to 64 MiB
_MIN_SAMPLE_SECONDS = 5e-3
_MAX_CALL_SECONDS = 0.3                      # no larger size is tried, except the second: a line needs two


def time_collective_by_payload(mesh: Mesh, axis: MeshAxis, op: str = "all_reduce",
                               rounds: int = 7) -> dict[int, list[float]]:
    """Seconds of one `op` ("all_reduce" or "send"), measured `rounds` times, for each payload in bytes.

    All ranks return the same. A send is timed there and back between neighbours, and halved. Every rank of
    the mesh calls it.
    """
    times = {}
    for size in _PAYLOAD_SIZES_BYTES:
        x = torch.zeros(size // 4, device=mesh.device)
        call = partial(_CALLS[op], x, axis)
        _sample(mesh, call, 2)                                   # warm up: buffers, connections
        calls = max(1, min(100, round(_MIN_SAMPLE_SECONDS / _sample(mesh, call, 2))))
        times[size] = [_sample(mesh, call, calls) / _TRIPS[op] for _ in range(rounds)]
        if len(times) > 1 and 4 * _TRIPS[op] * median(times[size]) > _MAX_CALL_SECONDS:
            break                                                # the next size has four times the bytes
    return times


def measure_matmul_flops_per_second(mesh: Mesh, dtype: torch.dtype, rounds: int = 7) -> list[float]:
    """FLOP/s of one rank while all ranks multiply n x n matrices: `rounds` measurements at the fastest n."""
    best = [0.0]
    for n in (4096, 8192, 16384) if mesh.device == "cuda" else (512, 1024, 2048):
        a, b = torch.randn(2, n, n, device=mesh.device).to(dtype)
        call = partial(torch.matmul, a, b)
        once = _sample(mesh, call, 1)
        rates = [2 * n ** 3 / _sample(mesh, call, 1) for _ in range(rounds)]
        best = max(best, rates, key=median)
        if 8 * once > _MAX_CALL_SECONDS:
            break                                                # twice the n, eight times the work
    return best


def _sample(mesh, call, calls):
    """Seconds of a call, the mean of `calls` in a row, on the slowest rank."""
    comm.barrier(mesh.world, "probe")
    _synchronize(mesh)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _synchronize(mesh)
    took = torch.tensor((time.perf_counter() - begin) / calls, dtype=torch.float64)
    return comm.all_reduce(took, mesh.world, "probe", op="max").item()


def _synchronize(mesh):
    if mesh.device == "cuda":
        torch.cuda.synchronize()             # a call only queues work there


def _there_and_back(x, axis):
    partner = axis.rank ^ 1
    if partner >= axis.size:
        return                               # the last of an odd number
    for mine in (axis.rank, partner):        # the even rank sends first
        if mine % 2 == 0:
            comm.send(x, axis, partner, "probe")
        else:
            comm.recv(x, axis, partner, "probe")


_CALLS = {"all_reduce": partial(comm.all_reduce, tag="probe"), "send": _there_and_back}
_TRIPS = {"all_reduce": 1, "send": 2}
