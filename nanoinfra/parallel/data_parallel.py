"""Data parallelism: every rank holds all weights, computes on its own tokens, and gradients are all-reduced.

    "each"     one all-reduce a parameter, after backward           calls: parameters
    "buckets"  parameters packed into flat buckets, after backward  calls: buckets
    "overlap"  a bucket is all-reduced when its last gradient is there, while backward continues
Payload Psi * gradient bytes a step, with any gradient accumulation; a ring sends 2 (N-1)/N of it.
PyTorch DDP (Li et al. 2020). Composes with any schedule: it only needs to know which backward is the last.
"""
from collections.abc import Collection, Iterator

import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis
from nanoinfra.distributed.reduce_scatter_gradients import (
    DEFAULT_BUCKET_BYTES,
    buffers_of_parameters,
    group_by_dtype_and_bytes,
    select_parameters,
)

GRAD_SYNC_MODES = ("each", "buckets", "overlap")


class DataParallel:
    """Gradient buckets over `axis` for any nn.Module whose loss is divided by the *global* token count.

    A parameter's gradient moves into its bucket as soon as autograd has it (`p.grad` is None afterwards),
    in `grad_dtype` (the parameter's own where not given). After `finish_grad_sync`, `grads[name]` is the sum
    over the axis, the same on all ranks. Frozen parameters are in no bucket; unused ones give zeros.
    Rank 0's weights are broadcast first. `param_names` (None: all) are the parameters that this is for;
    others are left as they are. Raises ValueError for a name that no parameter has, or that is in two groups.
    """

    def __init__(self, model: nn.Module, axis: MeshAxis, grad_sync: str = "overlap",
                 bucket_bytes: int = DEFAULT_BUCKET_BYTES, grad_dtype: torch.dtype | None = None,
                 param_names: Collection[str] | None = None):
        if grad_sync not in GRAD_SYNC_MODES:
            raise ValueError(f"data parallelism comes as {', '.join(GRAD_SYNC_MODES)}, not {grad_sync!r}")
        self.axis, self._overlap = axis, grad_sync == "overlap"
        self._params = select_parameters(model, param_names)
        named = [(name, p) for name, p in self._params.items() if p.requires_grad]
        self.param_shards = dict(named)                          # whole parameters here, unlike ZeRO's shards
        self.frozen_params = {name: p.detach() for name, p in self._params.items() if not p.requires_grad}
        self.buckets = pack_grad_buckets(named[::-1], 0 if grad_sync == "each" else bucket_bytes, grad_dtype)
        self.bucket_of_param = {p: bucket for bucket in self.buckets for p in bucket.grad_views}
        self.grads = {name: self.bucket_of_param[p].grad_views[p] for name, p in named}
        for tensor in (*self._params.values(), *buffers_of_parameters(model, self._params)):
            comm.broadcast(tensor.data, axis, "weights")
        for p in self._params.values():
            p.reduced_over = axis.name
        self._hooks = [p.register_post_accumulate_grad_hook(self._move_grad_to_bucket)
                       for p in self.bucket_of_param]
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the last step's gradients."""
        self._is_last_backward, self._num_launched = False, 0
        for bucket in self.buckets:
            bucket.params_with_grad.clear()

    def prepare_for_backward(self, is_last: bool) -> None:
        """Call before each backward. Buckets are all-reduced only in the last backward of the step."""
        self._is_last_backward = is_last
        for bucket in self.buckets:
            bucket.params_awaiting_grad = set(bucket.grad_views)

    def finish_grad_sync(self) -> dict[str, torch.Tensor]:
        """Start the remaining all-reduces and wait for all: {name: summed gradient}."""
        for bucket in self.buckets[self._num_launched:]:
            self._start_all_reduce(bucket)
        for bucket in self.buckets:
            bucket.async_all_reduce.wait()
        return self.grads

    @property
    def names_without_grad(self) -> set[str]:
        """The trained parameters that no backward since `zero_grad` has given a gradient on this rank."""
        return {name for name, p in self.param_shards.items()
                if p not in self.bucket_of_param[p].params_with_grad}

    def all_gather_params(self, include_frozen: bool = False) -> None:
        """Do nothing: every rank holds whole parameters, which its optimizer has updated."""

    def persistent_tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that are kept between steps."""
        yield from self._params.values()
        yield from (bucket.flat_grads for bucket in self.buckets)

    def _move_grad_to_bucket(self, p):
        bucket = self.bucket_of_param[p]
        if self._num_launched > self.buckets.index(bucket):
            raise RuntimeError(f"a gradient of shape {list(p.shape)} came after its bucket had left: a "
                               'module is used twice under recompute; use grad_sync="buckets", or ZeRO')
        _add_grad(p.grad, bucket.grad_views[p], first=p not in bucket.params_with_grad)
        p.grad = None
        bucket.params_with_grad.add(p)
        bucket.params_awaiting_grad.discard(p)
        while self._overlap and self._is_last_backward and self._num_launched < len(self.buckets) \
                and not self.buckets[self._num_launched].params_awaiting_grad:       # one order on all ranks
            self._start_all_reduce(self.buckets[self._num_launched])

    def _start_all_reduce(self, bucket):
        for p in bucket.grad_views.keys() - bucket.params_with_grad:                 # unused in this step
            bucket.grad_views[p].zero_()
        bucket.async_all_reduce = comm.all_reduce(bucket.flat_grads, self.axis, "grads", async_op=True)
        self._num_launched += 1


def _add_grad(grad, grad_view, first):
    """Copy or add `grad` into its view. An embedding's is sparse, and the same row may be in it twice."""
    if grad.is_sparse:
        grad_view = grad_view.zero_() if first else grad_view
        grad_view.index_add_(0, grad._indices()[0], grad._values().to(grad_view.dtype))
    elif first:
        grad_view.copy_(grad)
    else:
        grad_view.add_(grad)


class AllReduceBucket:
    """Gradients that one all-reduce sums: `grad_views[p]` is parameter p's part of `flat_grads`."""

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype):
        self.flat_grads = torch.zeros(sum(p.numel() for p in params), dtype=dtype, device=params[0].device)
        parts = self.flat_grads.split([p.numel() for p in params])
        self.grad_views = {p: part.view_as(p) for p, part in zip(params, parts)}
        self.params_with_grad, self.params_awaiting_grad = set(), set(self.grad_views)
        self.async_all_reduce: comm.AsyncCollective | None = None


def pack_grad_buckets(named_params: list[tuple[str, nn.Parameter]], bucket_bytes: int,
                      grad_dtype: torch.dtype | None) -> list[AllReduceBucket]:
    """Buckets of one dtype and at most `bucket_bytes`, in the order given (of backward: last first)."""
    groups = group_by_dtype_and_bytes([p for _, p in named_params],
                                      lambda p: (grad_dtype or p.dtype, p.numel()), bucket_bytes)
    return [AllReduceBucket(group, grad_dtype or group[0].dtype) for group in groups]
