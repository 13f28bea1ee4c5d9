"""Apply a plan of parallelism to a plain model, in one fixed order.

1. Tensor and sequence parallelism cut the parameters: all that follows sees smaller ones.
2. Recompute replaces what a block runs, its collectives included; the block stays what others hook.
3. Weights are filled in: each rank reads, or draws, its own parts.
4. ZeRO or data parallelism, over ranks that hold the same parts, cuts or sums what is there by then.
Context and pipeline parallelism will join; what does not exist is refused in train/config.py before any rank
starts. Every technique composes through the mesh alone.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nanoinfra.memory import recompute
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.fill import Read
from nanoinfra.parallel.data import DataParallel
from nanoinfra.parallel.megatron import TensorParallel, exchange
from nanoinfra.parallel.vocabulary import HeadLoss
from nanoinfra.parallel.zero import Zero


@dataclass(frozen=True)
class Plan:
    """What to apply besides the mesh; the dtypes are those of weights and of summed gradients."""
    sp: str = "none"                         # sequence.SP
    zero: int = 0                            # stage; 0 is plain data parallelism
    recompute: str = "none"                  # recompute.HOW
    data_parallel: str = "overlap"           # data.STEPS, at stage 0
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None


class Composed:
    """`model`, without storage so far, made this rank's part of a training on `mesh`; `loss` ends it.

    `read(name, part)` gives the first weights. What `masters` holds, {name: float32 tensor}, or where
    that is None the `shards`, is the optimizer's to move.
    """

    def __init__(self, model: Decoder, mesh, plan: Plan, read: Read):
        self.model, self.mesh, self.zero = model, mesh, plan.zero
        self.tensor = TensorParallel(model, mesh, plan.sp)
        self.loss, self.masters = HeadLoss(model.head), None
        recompute.apply(model, plan.recompute)

        def source(name):
            return self.tensor.part(read, name, mesh.device)
        if plan.zero:
            self.data = Zero(model, mesh.data, plan.zero, units(model, self.loss), plan.dtype,
                             plan.grad_dtype, source=source)
        else:
            exchange(model, lambda name, p: nn.Parameter(source(name), p.requires_grad))
            if plan.dtype.itemsize < 4:
                self.masters = {name: p.detach() for name, p in model.named_parameters()}
            exchange(model, lambda name, p: nn.Parameter(p.detach().to(plan.dtype), p.requires_grad))
            self.data = DataParallel(model, mesh.data, plan.data_parallel, grad_dtype=plan.grad_dtype)
        self.shards = self.data.shards

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the gradients' sums, over data and over tensor ranks."""
        return self.tensor.finish(self.data.finish())

    def norm_axes(self) -> list:
        """The axes whose ranks hold different gradients: their norms add up over these."""
        return [self.mesh.tp, self.mesh.data] if self.zero else [self.mesh.tp]

    def box(self, name: str) -> tuple[tuple[int, int], ...]:
        """The part of the logical parameter `name` that this rank's optimizer moves: (start, stop) by dim."""
        box = self.tensor.boxes[name]
        if not self.zero or not box:
            return box
        (begin, _), (start, stop) = box[0], self.data.rows[name]
        return (begin + start, begin + stop), *box[1:]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All it holds between steps."""
        return self.data.tensors()


def serving(model: Decoder, mesh, read: Read, dtype: torch.dtype) -> Decoder:
    """`model`, without storage so far, cut over `mesh.tp` and filled, for generation."""
    tensor = TensorParallel(model, mesh)
    exchange(model, lambda name, p: nn.Parameter(tensor.part(read, name, mesh.device, dtype), False))
    return model


def units(model: nn.Module, last: nn.Module) -> list[list[nn.Module]]:
    """What ZeRO-3 gathers together: the embeddings, each block, and the norm with `last`, head and loss."""
    ends = ("embed", "positions", "embed_norm")
    embeddings = [module for name, module in model.named_children() if name in ends]
    return [embeddings, *([block] for block in model.blocks), [model.norm, last]]
