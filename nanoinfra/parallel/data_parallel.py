"""Data parallelism in three steps: all weights on every rank, tokens of its own, gradients summed.

    "each"     one all-reduce a parameter, after backward           calls: parameters
    "buckets"  parameters packed into flat buckets, after backward  calls: buckets
    "overlap"  a bucket leaves when its last gradient arrives, while backward goes on
Payload Psi * gradient bytes a step, however many micro-batches it accumulates; a ring sends 2 (N-1)/N of it.
PyTorch DDP (Li et al. 2020). Composes with any schedule: it only asks which backward is the last.
"""
from collections.abc import Iterator

import torch
from torch import nn

from nanoinfra.distributed import comm

STEPS = ("each", "buckets", "overlap")
BUCKET_BYTES = 25 << 20


class DataParallel:
    """Gradient buckets over `axis` for any nn.Module whose loss is divided by the *global* token count.

    A parameter's gradient moves into its bucket as soon as autograd has it (`p.grad` is None afterwards),
    in `grad_dtype` (the parameter's own where not given). After `finish`, `grads[name]` is the sum over the
    axis, the same on all ranks. Frozen parameters have no place; unused ones give zeros.
    Rank 0's weights are broadcast first.
    """

    def __init__(self, model: nn.Module, axis, how: str = "overlap", bucket_bytes: int = BUCKET_BYTES,
                 grad_dtype: torch.dtype | None = None):
        if how not in STEPS:
            raise ValueError(f"data parallelism comes as {', '.join(STEPS)}, not {how!r}")
        self.axis, self.overlap, self.model = axis, how == "overlap", model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.shards = dict(named)                                            # whole, unlike ZeRO's
        self.frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self.buckets = pack(named[::-1], 0 if how == "each" else bucket_bytes, grad_dtype)
        self.home = {p: bucket for bucket in self.buckets for p in bucket.views}
        self.grads = {name: self.home[p].views[p] for name, p in named}
        for tensor in (*model.parameters(), *model.buffers()):
            comm.broadcast(tensor.data, axis, "weights")
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrive) for p in self.home]
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        self.last, self.launched = False, 0
        for bucket in self.buckets:
            bucket.filled.clear()

    def before_backward(self, last: bool) -> None:
        """Say before each backward whether it is the step's last: only then may buckets leave."""
        self.last = last
        for bucket in self.buckets:
            bucket.waiting = set(bucket.views)

    def finish(self) -> dict[str, torch.Tensor]:
        """Send what has not left, wait for everything: {name: summed gradient}."""
        for bucket in self.buckets[self.launched:]:
            self._launch(bucket)
        for bucket in self.buckets:
            bucket.pending.wait()
        return self.grads

    def publish(self, frozen: bool = False) -> None:
        """After the optimizer's step: nothing to do, every rank has moved all weights alike."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """All it holds between steps."""
        yield from self.model.parameters()
        yield from (bucket.flat for bucket in self.buckets)

    def _arrive(self, p):
        bucket = self.home[p]
        if self.launched > self.buckets.index(bucket):
            raise RuntimeError(f"a gradient of shape {list(p.shape)} came after its bucket had left: a "
                               'module is used twice under recompute; use how="buckets", or ZeRO')
        add(p.grad, bucket.views[p], first=p not in bucket.filled)
        p.grad = None
        bucket.filled.add(p)
        bucket.waiting.discard(p)
        while self.overlap and self.last and self.launched < len(self.buckets) \
                and not self.buckets[self.launched].waiting:                 # all ranks launch in one order
            self._launch(self.buckets[self.launched])

    def _launch(self, bucket):
        for p in bucket.views.keys() - bucket.filled:                        # unused in this step
            bucket.views[p].zero_()
        bucket.pending = comm.all_reduce(bucket.flat, self.axis, "grads", wait=False)
        self.launched += 1


def add(grad: torch.Tensor, into: torch.Tensor, first: bool) -> None:
    """`grad` into its place. An embedding's is sparse: rows, of which the same may come twice."""
    if grad.is_sparse:
        into = into.zero_() if first else into
        into.index_add_(0, grad._indices()[0], grad._values().to(into.dtype))
    elif first:
        into.copy_(grad)
    else:
        into.add_(grad)


class Bucket:
    """One flat tensor; `views[p]` is where parameter p's gradient lies in it."""

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype):
        self.flat = torch.zeros(sum(p.numel() for p in params), dtype=dtype, device=params[0].device)
        parts = self.flat.split([p.numel() for p in params])
        self.views = {p: part.view_as(p) for p, part in zip(params, parts)}
        self.filled, self.waiting, self.pending = set(), set(self.views), None


def pack(named: list[tuple[str, nn.Parameter]], bucket_bytes: int,
         grad_dtype: torch.dtype | None) -> list[Bucket]:
    """Fill one-dtype buckets up to `bucket_bytes` in the order given (backward's: last parameter first)."""
    groups, dtype, size = [], None, 0
    for _, p in named:
        wanted = grad_dtype or p.dtype
        added = p.numel() * wanted.itemsize
        if not groups or wanted != dtype or size + added > bucket_bytes:
            groups.append([])
            dtype, size = wanted, 0
        groups[-1].append(p)
        size += added
    return [Bucket(group, grad_dtype or group[0].dtype) for group in groups]
