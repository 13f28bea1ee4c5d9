"""Collectives and messages: all communication of nanoinfra goes through this file, and into the CommLog.

An axis of size 1 sends nothing, and everything else runs as on any other. With `async_op=True` a call returns
an AsyncCollective at once, whose `wait()` gives the result. Payload bytes are counted here: what all-reduce
sums, all-gather returns, reduce-scatter and all-to-all take. On gloo, reduce-scatter is an all-to-all and a
local sum, which is faster.
"""
import functools
import json
import time

import torch
import torch.distributed as dist

from nanoinfra.distributed.emulated_link import sleep_until
from nanoinfra.distributed.mesh import MeshAxis

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class CollectiveFailed(RuntimeError):
    """A collective did not complete, because one of its ranks died or did not join it in time."""


class AsyncCollective:
    """A collective that is still running. Without arguments: one that is complete, with `result`."""

    def __init__(self, result=None, works=(), make_result=None, axis=None, record=None, transfer=None):
        self._result, self._works, self._make_result = result, works, make_result
        self._axis, self._record, self._transfer = axis, record, transfer

    def wait(self):
        """Block until the collective is complete and return its result; later calls return it again.

        The time spent here is the record's `wait_seconds`: communication that no computation hid. Raises
        CollectiveFailed.
        """
        if self._make_result:
            begin = time.monotonic()
            self._axis.comm_log.mark_waiting(self._record)
            self._wait_for_works()
            self._works = ()                 # a torch Work keeps the tensors that it sent
            if self._transfer:
                self._axis.emulated_link.sleep_until_done(self._transfer)
            self._result, self._make_result = self._make_result(), None
            self._axis.comm_log.finish_record(self._record, time.monotonic() - begin)
        return self._result

    def _wait_for_works(self):
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            record, reason = self._record, str(error).rpartition("] ")[2].partition(". This")[0]
            raise CollectiveFailed(f"{record.op} #{record.sequence_number} ({record.axis_name}) did not end: "
                                   f"{reason}") from error


def all_reduce(x: torch.Tensor, axis: MeshAxis, tag: str = "", op: str = "sum",
               async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Sum `x` over the axis, in place; `op` "max" or "min" takes the maximum or minimum instead."""
    dense = x.contiguous()
    return _collective("all_reduce", axis, tag, _num_bytes(x), x, async_op, lambda: _copy_back(dense, x),
                       lambda: dist.all_reduce(dense, _OPS[op], group=axis.group, async_op=True))


def all_gather(x: torch.Tensor, axis: MeshAxis, tag: str = "", async_op: bool = False,
               out: torch.Tensor | None = None) -> torch.Tensor | AsyncCollective:
    """Stack every rank's `x`: (N, *x.shape). `out` may be given; its row `axis.rank` may be `x` itself."""
    if out is None:
        out = x.new_empty(axis.size, *x.shape)                                         # (N, ...)
    return _collective("all_gather", axis, tag, _num_bytes(out), x[None], async_op, lambda: out,
                       lambda: _all_gather(out.view(-1), x.contiguous().view(-1), group=axis.group,
                                           async_op=True))


def reduce_scatter(x: torch.Tensor, axis: MeshAxis, tag: str = "",
                   async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Sum `x` (N, ...) over the axis and return row `axis.rank` of the sum: (...)."""
    if x.device.type == "cpu":
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)     # (N, ...) my row, of each rank
        group = axis.group
        return _collective("reduce_scatter", axis, tag, _num_bytes(x), x[0], async_op, lambda: _sum(parts),
                           lambda: dist.all_to_all_single(parts, x.contiguous(), group=group, async_op=True))
    out = torch.empty_like(x[0])
    return _collective("reduce_scatter", axis, tag, _num_bytes(x), x[0], async_op, lambda: out,
                       lambda: _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=axis.group,
                                               async_op=True))


def all_to_all(x: torch.Tensor, axis: MeshAxis, tag: str = "",
               async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Send row j of `x` (N, ...) to rank j; row i of the result came from rank i."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _collective("all_to_all", axis, tag, _num_bytes(x), x, async_op, lambda: out,
                       lambda: dist.all_to_all_single(out, x.contiguous(), group=axis.group, async_op=True))


def broadcast(x: torch.Tensor, axis: MeshAxis, tag: str = "", src: int = 0,
              async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Overwrite `x` with the `x` of rank `src` of the axis."""
    dense = x.contiguous()
    return _collective("broadcast", axis, tag, _num_bytes(x), x, async_op, lambda: _copy_back(dense, x),
                       lambda: dist.broadcast(dense, axis.global_ranks[src], group=axis.group, async_op=True))


def barrier(axis: MeshAxis, tag: str = "") -> None:
    """Return when every rank of the axis has called this."""
    _collective("barrier", axis, tag, 0, None, False, lambda: None,
                lambda: dist.all_reduce(torch.zeros(1), group=axis.group, async_op=True))


def ring_shift(x: torch.Tensor, axis: MeshAxis, tag: str = "",
               async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Send `x` to the next rank of the ring and return the tensor, of the same shape, of the previous one."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    right, left = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return _messages("ring_shift", axis, tag, async_op, x, [(x, right)], [(out, left)], lambda: out)


def send(x: torch.Tensor, axis: MeshAxis, dst: int, tag: str = "",
         async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Send `x` to rank `dst` of the axis."""
    return _messages("send", axis, tag, async_op, x, [(x, dst)], [], lambda: x)


def recv(x: torch.Tensor, axis: MeshAxis, src: int, tag: str = "",
         async_op: bool = False) -> torch.Tensor | AsyncCollective:
    """Receive a tensor from rank `src` of the axis into `x`."""
    dense = x.contiguous()
    return _messages("recv", axis, tag, async_op, x, [], [(dense, src)], lambda: _copy_back(dense, x))


def all_gather_json(value, axis: MeshAxis, tag: str = "") -> list:
    """Gather every rank's `value` (anything that JSON can hold), in axis order, on every rank."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = int(all_reduce(torch.tensor(len(text)), axis, tag, op="max"))
    padded = torch.cat([text, torch.full((longest - len(text),), 32, dtype=torch.uint8)])
    return [json.loads(bytes(row.tolist())) for row in all_gather(padded, axis, tag)]


def _collective(op, axis, tag, payload_bytes, one_rank_result, async_op, make_result, start):
    """Open a record in the log and start the collective; on an axis of one rank only return the result."""
    if axis.size == 1:
        collective = AsyncCollective(one_rank_result)
    else:
        record = axis.comm_log.start_record(op, axis, tag, payload_bytes)
        start_max = functools.partial(_start_max, axis)
        link = axis.emulated_link
        transfer = link.start_transfer(op, payload_bytes, axis.size, start_max) if link else None
        collective = AsyncCollective(None, [start()], make_result, axis, record, transfer)
    return collective if async_op else collective.wait()


def _start_max(axis, timestamp):
    """Start to replace `timestamp` (1,) by the latest of all ranks' timestamps, for the emulated link."""
    return dist.all_reduce(timestamp, _OPS["max"], group=axis.group, async_op=True)


def _messages(op, axis, tag, async_op, x, sends, recvs, make_result):
    """Sends and receives under one record; on an emulated link each message carries its arrival time."""
    if axis.size == 1:
        return AsyncCollective(x) if async_op else x
    pair = (axis.rank, sends[0][1]) if op == "send" else (recvs[0][1], axis.rank) if op == "recv" else None
    record = axis.comm_log.start_record(op, axis, tag, _num_bytes(x),
                                        pair and tuple(axis.global_ranks[rank] for rank in pair))
    link = axis.emulated_link
    arrivals = [torch.empty(1, dtype=torch.float64) for _ in recvs] if link else []
    if link:
        sends = [m for x, dst in sends
                 for m in ((link.schedule_message_arrival(_num_bytes(x)), dst), (x, dst))]
        recvs = [m for stamp, (x, src) in zip(arrivals, recvs) for m in ((stamp, src), (x, src))]
    works = [dist.isend(x.contiguous(), axis.global_ranks[dst], group=axis.group) for x, dst in sends]
    works += [dist.irecv(x, axis.global_ranks[src], group=axis.group) for x, src in recvs]

    def result_after_arrival():
        for arrival in arrivals:
            sleep_until(arrival.item())
        return make_result()
    collective = AsyncCollective(None, works, result_after_arrival, axis, record)
    return collective if async_op else collective.wait()


def _sum(parts):
    return parts[0] + parts[1] if len(parts) == 2 else parts.sum(0)      # the same number, ten times as fast


def _copy_back(dense, x):
    return x if dense is x else x.copy_(dense)         # torch.distributed sends contiguous memory only


def _num_bytes(x):
    return x.numel() * x.element_size()


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
