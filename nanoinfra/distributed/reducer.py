"""Sum gradients over an axis in buckets, each rank keeping its rows: one bucket fills while one leaves.

A gradient moves into its bucket as autograd delivers it, and a bucket leaves, by one reduce-scatter, as soon
as it is full and those before it have left. No more than two buckets' bytes exist at a time: on gloo, where
what arrives needs room of its own, three buckets share that room. Overlap: Li et al. 2020 (DDP); scattered
and let go of at once: Rajbhandari et al. 2020 (ZeRO), section 5.2.
N ranks, S elements of a bucket that go to each.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf, prod

import torch
import torch.nn.functional as F

from nanoinfra.distributed import comm


@dataclass(frozen=True, eq=False)
class Leaf:
    """`param`, whose gradient is cut into N pieces of shape `piece`; it adds to what is called `name`."""
    param: torch.nn.Parameter
    name: str
    piece: torch.Size


class Reducer:
    """Buckets of `leaves`, in the order in which their gradients come, summed in `dtype` (default: theirs).

    Gradients on their way hold at most 2 `bucket_bytes`, or twice the largest leaf's. `grads[name]` is this
    rank's piece of the sum, over ranks, leaves of that name and micro-batches since `begin_step`.
    """

    def __init__(self, leaves: list[Leaf], axis, bucket_bytes: int, dtype: torch.dtype | None = None):
        self.axis = axis
        self.copies = 2 if leaves[0].param.device.type == "cpu" else 1   # of a bucket under way
        groups = pack(leaves, lambda leaf: (dtype or leaf.param.dtype, axis.size * prod(leaf.piece)),
                      2 * bucket_bytes // (1 + self.copies))
        self.buckets = [Bucket(group, axis.size, dtype or group[0].param.dtype) for group in groups]
        self.home = {leaf.param: bucket for bucket in self.buckets for leaf in bucket.leaves}
        self.room = 2 * max(bucket_bytes, *(bucket.nbytes for bucket in self.buckets))
        self.flight, self.grads = None, {}
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the last step's gradients, and those of a step that was given up."""
        self._settle()
        self.grads, self.leaving, self.next = {}, False, 0
        for bucket in self.buckets:
            bucket.flat = None
            bucket.filled.clear()

    def before_backward(self, leaving: bool) -> None:
        """Say before each backward whether full buckets may leave, or wait for another backward to add."""
        self._flush()
        self.leaving, self.next = leaving, 0
        for bucket in self.buckets:
            bucket.waiting = {leaf.param for leaf in bucket.leaves}

    def arrive(self, param: torch.nn.Parameter) -> None:
        """Take `param.grad`, which becomes None; what is full leaves, in one order on all ranks."""
        bucket = self.home[param]
        if bucket.flat is None:
            self._make_room(bucket.nbytes)
            bucket.open()
        bucket.put(param)
        while self.leaving and self.next < len(self.buckets) and not self.buckets[self.next].waiting:
            self.next += 1
            self._launch(self.buckets[self.next - 1])

    def finish(self) -> dict[str, torch.Tensor]:
        """Send what has not left, wait for everything: `grads`. Where backward brought none, zeros."""
        self._flush()
        self._settle()
        return self.grads

    def _flush(self):
        """Send what still waits for a gradient, and what took one after it had left."""
        for i, bucket in enumerate(self.buckets if self.leaving else ()):
            if i >= self.next or bucket.flat is not None:
                self._launch(bucket)
        self.next = len(self.buckets)

    def _launch(self, bucket):
        self._settle()
        self.flight = bucket, comm.reduce_scatter(bucket.close(), self.axis, "grads", wait=False)

    def _make_room(self, wanted):
        held = sum(bucket.nbytes for bucket in self.buckets if bucket.flat is not None)
        if self.flight and wanted + held + self.copies * self.flight[0].nbytes > self.room:
            self._settle()

    def _settle(self):
        if self.flight:
            (bucket, pending), self.flight = self.flight, None
            for leaf, rows in zip(bucket.leaves, pending.wait().split(bucket.sizes)):
                if leaf.name in self.grads:
                    self.grads[leaf.name].add_(rows.view(leaf.piece))
                else:
                    self.grads[leaf.name] = rows.view(leaf.piece)


class Bucket:
    """Gradients that leave together: row r of `flat` (N, S) goes to rank r. Between uses there is none."""

    def __init__(self, leaves, n, dtype):
        self.leaves, self.sizes = leaves, [prod(leaf.piece) for leaf in leaves]
        self.empty = leaves[0].param.new_empty(0, dtype=dtype, requires_grad=False)
        self.shape = n, sum(self.sizes)
        self.nbytes = prod(self.shape) * dtype.itemsize
        self.flat, self.waiting, self.filled = None, set(), set()

    def open(self):
        self.flat = self.empty.new_empty(self.shape)                     # (N, S)
        columns = self.flat.split(self.sizes, dim=1)                     # (N, piece) each
        self.columns = {leaf.param: column for leaf, column in zip(self.leaves, columns)}

    def put(self, param):
        """Lay the gradient in its column, or add it to what is there; the last ranks may have fewer rows."""
        column, grad, param.grad = self.columns[param], param.grad, None
        grad = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        if grad.numel() < column.numel():
            grad = F.pad(grad, (0, column.numel() - grad.numel()))
        rows = grad.view(column.shape)                                   # (N, piece)
        column.add_(rows) if param in self.filled else column.copy_(rows)
        self.filled.add(param)
        self.waiting.discard(param)

    def close(self):
        """The flat tensor, with zeros where no gradient came; from now on the caller's."""
        if self.flat is None:
            self.open()
        for param in self.columns.keys() - self.filled:
            self.columns[param].zero_()
        flat, self.flat, self.columns = self.flat, None, None
        self.filled.clear()
        return flat


def pack(items: Iterable, measure: Callable, limit: float = inf) -> list[list]:
    """Groups of items of one dtype, in the order given, up to `limit` bytes; what is larger goes alone.

    `measure(item)` gives (dtype, elements).
    """
    groups, last, size = [], None, 0
    for item in items:
        dtype, elements = measure(item)
        if not groups or dtype != last or size + elements * dtype.itemsize > limit:
            groups.append([])
            last, size = dtype, 0
        groups[-1].append(item)
        size += elements * dtype.itemsize
    return groups
