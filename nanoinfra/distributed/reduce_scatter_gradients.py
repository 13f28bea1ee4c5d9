"""Sum gradients over an axis in buckets by reduce-scatter: each rank keeps its rows of the sum.

A gradient moves into its bucket as soon as autograd has it. A full bucket is sent, by one reduce-scatter,
after those before it, while backward fills the next one. At most two buckets' bytes exist at a time; on gloo,
where a reduce-scatter needs a receive buffer, three smaller buckets share that memory. Overlap: Li et al.
2020 (DDP); reduce-scatter, then free the bucket: Rajbhandari et al. 2020 (ZeRO), section 5.2. N ranks, S
elements of a bucket that go to each.
"""
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis

DEFAULT_BUCKET_BYTES = 25 << 20              # as in PyTorch's DDP


@dataclass(frozen=True, eq=False)
class BucketedParam:
    """A parameter whose gradient is sharded over the N ranks; gradients of the same `name` are added."""
    param: torch.nn.Parameter
    name: str
    shard_shape: torch.Size                  # of each rank's rows of the gradient


class GradientReducer:
    """Gradient buckets of `params`, given in the order in which backward reaches them.

    Gradients are summed in `dtype` (default: their own). Buckets hold at most 2 `bucket_bytes` at a time, or
    twice the largest parameter's gradient. `grads[name]` is this rank's shard of the sum over ranks, over
    parameters of that name and over the micro-batches since `zero_grad`. Of `names_without_grad` none has
    come since then.
    """

    def __init__(self, params: list[BucketedParam], axis: MeshAxis, bucket_bytes: int = DEFAULT_BUCKET_BYTES,
                 dtype: torch.dtype | None = None):
        def dtype_and_numel(each):
            return dtype or each.param.dtype, axis.size * prod(each.shard_shape)
        self.axis, self.grads = axis, {}
        on_cpu = any(each.param.device.type == "cpu" for each in params)
        self._buffers_per_bucket = 2 if on_cpu else 1                    # gloo receives apart
        max_bytes = 2 * bucket_bytes // (1 + self._buffers_per_bucket)
        groups = group_by_dtype_and_bytes(params, dtype_and_numel, max_bytes)
        self.buckets = [ReduceScatterBucket(group, axis.size, dtype or group[0].param.dtype)
                        for group in groups]
        self.bucket_of_param = {each.param: bucket for bucket in self.buckets for each in bucket.params}
        self._name_of_param = {each.param: each.name for each in params}
        self._max_inflight_bytes = 2 * max([bucket_bytes, *(bucket.nbytes for bucket in self.buckets)])
        self._in_flight = None               # (bucket, its reduce-scatter)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the last step's gradients, and those of a step that was not finished."""
        self._wait_in_flight()
        self.grads = {}
        self.names_without_grad = set(self._name_of_param.values())
        self._sync_gradients, self._next_bucket = False, 0
        for bucket in self.buckets:
            bucket.flat_grads = None
            bucket.params_with_grad.clear()

    def prepare_for_backward(self, sync_gradients: bool) -> None:
        """Call before each backward. `sync_gradients`: send buckets when full; else accumulate in them."""
        self._send_incomplete_buckets()
        self._sync_gradients, self._next_bucket = sync_gradients, 0
        for bucket in self.buckets:
            bucket.params_awaiting_grad = {each.param for each in bucket.params}

    def move_grad_to_bucket(self, param: torch.nn.Parameter) -> None:
        """Move `param.grad` into its bucket, and send full buckets, in one order on all ranks."""
        bucket = self.bucket_of_param[param]
        self.names_without_grad.discard(self._name_of_param[param])
        if bucket.flat_grads is None:
            self._make_room(bucket.nbytes)
            bucket.allocate_flat_grads()
        bucket.add_grad(param)
        while self._sync_gradients and self._next_bucket < len(self.buckets) \
                and not self.buckets[self._next_bucket].params_awaiting_grad:
            self._next_bucket += 1
            self._start_reduce_scatter(self.buckets[self._next_bucket - 1])

    def finish_grad_sync(self) -> dict[str, torch.Tensor]:
        """Send the remaining buckets, wait, and return `grads`. Parameters without a gradient give zeros."""
        self._send_incomplete_buckets()
        self._wait_in_flight()
        return self.grads

    def _send_incomplete_buckets(self):
        """Send buckets that still await a gradient, and those that received one after they were sent."""
        for i, bucket in enumerate(self.buckets if self._sync_gradients else ()):
            if i >= self._next_bucket or bucket.flat_grads is not None:
                self._start_reduce_scatter(bucket)
        self._next_bucket = len(self.buckets)

    def _start_reduce_scatter(self, bucket):
        self._wait_in_flight()
        collective = comm.reduce_scatter(bucket.take_flat_grads(), self.axis, "grads", async_op=True)
        self._in_flight = bucket, collective

    def _make_room(self, new_bytes):
        held = sum(bucket.nbytes for bucket in self.buckets if bucket.flat_grads is not None)
        in_flight = self._buffers_per_bucket * self._in_flight[0].nbytes if self._in_flight else 0
        if self._in_flight and new_bytes + held + in_flight > self._max_inflight_bytes:
            self._wait_in_flight()

    def _wait_in_flight(self):
        if self._in_flight:
            (bucket, collective), self._in_flight = self._in_flight, None
            for each, rows in zip(bucket.params, collective.wait().split(bucket.shard_numels)):
                if each.name in self.grads:
                    self.grads[each.name].add_(rows.view(each.shard_shape))
                else:
                    self.grads[each.name] = rows.view(each.shard_shape)


class ReduceScatterBucket:
    """Gradients that one reduce-scatter sums: row r of `flat_grads` (N, S) goes to rank r."""

    def __init__(self, params: list[BucketedParam], num_ranks: int, dtype: torch.dtype):
        self.params, self.shard_numels = params, [prod(each.shard_shape) for each in params]
        self._empty = params[0].param.new_empty(0, dtype=dtype, requires_grad=False)
        self.shape = num_ranks, sum(self.shard_numels)
        self.nbytes = prod(self.shape) * dtype.itemsize
        self.flat_grads: torch.Tensor | None = None                      # freed between uses
        self.params_awaiting_grad, self.params_with_grad = set(), set()

    def allocate_flat_grads(self) -> None:
        """Allocate `flat_grads`, uninitialised."""
        self.flat_grads = self._empty.new_empty(self.shape)                  # (N, S)
        columns = self.flat_grads.split(self.shard_numels, dim=1)            # (N, shard numel) each
        self._columns = {each.param: column for each, column in zip(self.params, columns)}

    def add_grad(self, param: torch.nn.Parameter) -> None:
        """Move `param.grad` into its columns, or add it there; the last ranks may have fewer rows."""
        column, grad, param.grad = self._columns[param], param.grad, None
        grad = (grad.to_dense() if grad.is_sparse else grad).reshape(-1)
        if grad.numel() < column.numel():
            grad = F.pad(grad, (0, column.numel() - grad.numel()))
        rows = grad.view(column.shape)                                   # (N, shard numel)
        column.add_(rows) if param in self.params_with_grad else column.copy_(rows)
        self.params_with_grad.add(param)
        self.params_awaiting_grad.discard(param)

    def take_flat_grads(self) -> torch.Tensor:
        """Hand over `flat_grads` (N, S), with zeros for parameters that got no gradient."""
        if self.flat_grads is None:
            self.allocate_flat_grads()
        for param in self._columns.keys() - self.params_with_grad:
            self._columns[param].zero_()
        flat_grads, self.flat_grads, self._columns = self.flat_grads, None, None
        self.params_with_grad.clear()
        return flat_grads


def select_parameters(model: nn.Module, param_names: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters of `model` that `param_names` names (None: all), by name, in the model's order.

    Raises ValueError for a name that no parameter has, and for a parameter whose gradient another group sums
    already: a group notes its axis's name at its parameters, as `reduced_over`.
    """
    named = dict(model.named_parameters())
    if unknown := sorted(set(param_names or ()) - named.keys()):
        raise ValueError(f"no parameter is called {', '.join(unknown)}; param_names are those of "
                         "named_parameters()")
    selected = {name: p for name, p in named.items() if param_names is None or name in param_names}
    if taken := [name for name, p in selected.items() if hasattr(p, "reduced_over")]:
        raise ValueError(f"the gradients of {', '.join(taken)} are summed by another group already, over the "
                         f"axis {selected[taken[0]].reduced_over}; leave them out of param_names")
    return selected


def buffers_of_parameters(model: nn.Module, selected: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    """The buffers that start from rank 0's together with the `selected` parameters.

    Those of each module that holds one of them, and of modules without parameters where all are selected.
    """
    everything = len(selected) == len(list(model.parameters()))
    chosen = set(selected.values())
    return list({id(buffer): buffer for module in model.modules() for buffer in module.buffers(recurse=False)
                 if everything or chosen & set(module.parameters(recurse=False))}.values())


def group_by_dtype_and_bytes(items: Iterable, dtype_and_numel: Callable,
                             max_bytes: float = inf) -> list[list]:
    """Groups of consecutive items of one dtype, of at most `max_bytes` each; a larger item is a group alone.

    `dtype_and_numel(item)` gives the dtype and the number of elements.
    """
    groups, last_dtype, size = [], None, 0
    for item in items:
        dtype, numel = dtype_and_numel(item)
        if not groups or dtype != last_dtype or size + numel * dtype.itemsize > max_bytes:
            groups.append([])
            last_dtype, size = dtype, 0
        groups[-1].append(item)
        size += numel * dtype.itemsize
    return groups
