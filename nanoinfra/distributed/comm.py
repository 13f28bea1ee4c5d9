"""The one door to the wire: every collective of nanoinfra, each entered in the ledger.

An axis of size 1 skips the wire and nothing else. With `wait=False` a collective returns a `Pending` at
once, whose `.wait()` gives the result. Payload bytes are counted here (what all-reduce sums, all-gather
returns, reduce-scatter and all-to-all take); on gloo, reduce-scatter is an all-to-all and a local sum,
which is faster.
"""
import functools
import json
import time

import torch
import torch.distributed as dist

from nanoinfra.distributed.emulated_link import sleep_until

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class LostRank(RuntimeError):
    """A collective that did not end: one of its ranks has died, or did not come in time."""


class Pending:
    """A collective under way. `wait()` returns its result; a second call returns it again."""

    def __init__(self, result=None, works=(), finish=None, axis=None, row=None, transfer=None):
        self.result, self.works, self.finish = result, works, finish
        self.axis, self.row, self.transfer = axis, row, transfer

    def wait(self):
        """Block until done. The time spent here is the row's `wait_s`: communication that nothing hid."""
        if self.finish:
            begin = time.monotonic()
            self.axis.ledger.wait(self.row)
            self._end_works()
            self.works = ()                  # a work holds what it sent
            if self.transfer:
                self.axis.link.sleep_until_done(self.transfer)
            self.result, self.finish = self.finish(), None
            self.axis.ledger.leave(self.row, time.monotonic() - begin)
        return self.result

    def _end_works(self):
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            row, reason = self.row, str(error).rpartition("] ")[2].partition(". This")[0]
            raise LostRank(f"{row.op} #{row.seq} ({row.axis}) did not end: {reason}") from error


def all_reduce(x: torch.Tensor, axis, tag: str = "", op: str = "sum", wait: bool = True):
    """Sum (or "max", "min") `x` over the axis, in place."""
    dense = x.contiguous()
    return _run("all_reduce", axis, tag, _bytes(x), x, wait, lambda: _back(dense, x),
                lambda: dist.all_reduce(dense, _OPS[op], group=axis.group, async_op=True))


def all_gather(x: torch.Tensor, axis, tag: str = "", wait: bool = True, out: torch.Tensor | None = None):
    """Every rank's `x`, stacked: (N, *x.shape). In `out` where given, whose row `axis.rank` may be `x`."""
    if out is None:
        out = x.new_empty(axis.size, *x.shape)                                         # (N, ...)
    return _run("all_gather", axis, tag, _bytes(out), x[None], wait, lambda: out,
                lambda: _all_gather(out.view(-1), x.contiguous().view(-1), group=axis.group, async_op=True))


def reduce_scatter(x: torch.Tensor, axis, tag: str = "", wait: bool = True):
    """Sum `x` (N, ...) over the axis and keep row `axis.rank`: (...)."""
    if x.device.type == "cpu":
        parts = torch.empty_like(x, memory_format=torch.contiguous_format)     # (N, ...) my row, of each rank
        return _run("reduce_scatter", axis, tag, _bytes(x), x[0], wait, lambda: _sum(parts),
                    lambda: dist.all_to_all_single(parts, x.contiguous(), group=axis.group, async_op=True))
    out = torch.empty_like(x[0])
    return _run("reduce_scatter", axis, tag, _bytes(x), x[0], wait, lambda: out,
                lambda: _reduce_scatter(out.view(-1), x.contiguous().view(-1), group=axis.group,
                                        async_op=True))


def all_to_all(x: torch.Tensor, axis, tag: str = "", wait: bool = True):
    """Row j of `x` (N, ...) goes to rank j; row i of the result came from rank i."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _run("all_to_all", axis, tag, _bytes(x), x, wait, lambda: out,
                lambda: dist.all_to_all_single(out, x.contiguous(), group=axis.group, async_op=True))


def broadcast(x: torch.Tensor, axis, tag: str = "", source: int = 0, wait: bool = True):
    """Overwrite `x` with that of `source`, a place on the axis."""
    dense = x.contiguous()
    return _run("broadcast", axis, tag, _bytes(x), x, wait, lambda: _back(dense, x),
                lambda: dist.broadcast(dense, axis.ranks[source], group=axis.group, async_op=True))


def barrier(axis, tag: str = "") -> None:
    """Return when every rank of the axis has come here."""
    _run("barrier", axis, tag, 0, None, True, lambda: None,
         lambda: dist.all_reduce(torch.zeros(1), group=axis.group, async_op=True))


def exchange(x: torch.Tensor, axis, tag: str = "", wait: bool = True):
    """Give `x` to the right neighbour, take one of the same shape from the left."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    right, left = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return _messages("exchange", axis, tag, wait, x, [(x, right)], [(out, left)], finish=lambda: out)


def send(x: torch.Tensor, axis, to: int, tag: str = "", wait: bool = True):
    """Send `x` to place `to` on the axis."""
    return _messages("send", axis, tag, wait, x, [(x, to)], [], finish=lambda: x)


def recv(x: torch.Tensor, axis, source: int, tag: str = "", wait: bool = True):
    """Fill `x` from place `source` on the axis."""
    dense = x.contiguous()
    return _messages("recv", axis, tag, wait, x, [], [(dense, source)], finish=lambda: _back(dense, x))


def gather_objects(value, axis, tag: str = "") -> list:
    """Every rank's `value` (anything JSON can hold), in axis order, on every rank."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = int(all_reduce(torch.tensor(len(text)), axis, tag, op="max"))
    padded = torch.cat([text, torch.full((longest - len(text),), 32, dtype=torch.uint8)])
    return [json.loads(bytes(row.tolist())) for row in all_gather(padded, axis, tag)]


def _run(op, axis, tag, payload, alone, wait, finish, start):
    """Enter the ledger and start; on an axis of one rank the answer is `alone`."""
    if axis.size == 1:
        pending = Pending(alone)
    else:
        row = axis.ledger.enter(op, axis, tag, payload)
        latest = functools.partial(_latest, axis)
        transfer = axis.link.enter(op, payload, axis.size, latest) if axis.link else None
        pending = Pending(None, [start()], finish, axis, row, transfer)
    return pending.wait() if wait else pending


def _latest(axis, stamp):
    """Start to make `stamp` (1,) the latest of all ranks' entry times, for the emulated wire."""
    return dist.all_reduce(stamp, _OPS["max"], group=axis.group, async_op=True)


def _messages(op, axis, tag, wait, x, gives, takes, finish):
    """Sends and receives as one ledger row; on an emulated wire each carries its arrival time."""
    if axis.size == 1:
        return x if wait else Pending(x)
    pair = (axis.rank, gives[0][1]) if op == "send" else (takes[0][1], axis.rank) if op == "recv" else None
    row = axis.ledger.enter(op, axis, tag, _bytes(x), pair and tuple(axis.ranks[place] for place in pair))
    arrivals = [torch.empty(1, dtype=torch.float64) for _ in takes] if axis.link else []
    if axis.link:
        gives = [m for x, to in gives for m in ((axis.link.depart(_bytes(x)), to), (x, to))]
        takes = [m for stamp, (x, source) in zip(arrivals, takes) for m in ((stamp, source), (x, source))]
    works = [dist.isend(x.contiguous(), axis.ranks[to], group=axis.group) for x, to in gives]
    works += [dist.irecv(x, axis.ranks[source], group=axis.group) for x, source in takes]

    def arrived():
        for stamp in arrivals:
            sleep_until(stamp.item())
        return finish()
    pending = Pending(None, works, arrived, axis, row)
    return pending.wait() if wait else pending


def _sum(parts):
    return parts[0] + parts[1] if len(parts) == 2 else parts.sum(0)      # the same number, ten times as fast


def _back(dense, x):
    return x if dense is x else x.copy_(dense)         # the wire reads memory and knows no strides


def _bytes(x):
    return x.numel() * x.element_size()


_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
