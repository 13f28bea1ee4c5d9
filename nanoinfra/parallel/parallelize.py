"""Apply a plan of parallelism to a plain model, in one fixed order.

1. The pipeline cuts the layers into chunks: all that follows sees a shorter model.
2. Tensor and sequence parallelism cut the parameters: from here on they are smaller.
3. Recompute replaces what a block runs, its collectives included; the block stays what others hook.
4. Weights are filled in: each rank reads, or draws, its own parts.
5. ZeRO or data parallelism, over ranks that hold the same parts, cuts or sums what is there by then.
What does not exist is refused in train/config.py. Every technique composes through the mesh alone.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.distributed import comm
from nanoinfra.formulas.pipeline import split
from nanoinfra.memory import recompute
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.fill_model import Read, empty
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.pipeline import stage as pipeline
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel, exchange
from nanoinfra.parallel.vocab_parallel import HeadLoss
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
    virtual: int = 1                         # chunks of the model a pipeline's stage has
    attention: str = "sdpa"
    frozen: frozenset[str] = frozenset()     # names of parameters that are not trained


class Composed:
    """`model`, a decoder or a pipeline's chunk of one, so far without storage: a rank's part of a training.

    `loss` ends the chunk that has the head. `read(name, part)` gives the first weights. What `masters`
    holds, {name: float32 tensor}, or where that is None the `shards`, is the optimizer's to move; what is
    `frozen`, {name: tensor}, nobody's.
    """

    def __init__(self, model: Decoder, mesh, plan: Plan, read: Read):
        self.model, self.zero = model, plan.zero
        for name in plan.frozen & dict(model.named_parameters()).keys():
            model.get_parameter(name).requires_grad_(False)
        self.tensor = TensorParallel(model, mesh, plan.sp)
        self.loss, self.masters = HeadLoss(model.head) if model.head else None, None
        recompute.apply(model, plan.recompute)

        def source(name):
            return self.tensor.part(read, name, mesh.device)
        if plan.zero:
            groups = units(model, self.loss) if plan.zero == 3 else None
            self.data = Zero(model, mesh.data, plan.zero, groups, plan.dtype, plan.grad_dtype, source=source)
        else:
            exchange(model, lambda name, p: nn.Parameter(source(name), p.requires_grad))
            if plan.dtype.itemsize < 4:
                self.masters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
            exchange(model, lambda name, p: nn.Parameter(p.detach().to(plan.dtype), p.requires_grad))
            self.data = DataParallel(model, mesh.data, plan.data_parallel, grad_dtype=plan.grad_dtype)
        self.shards, self.frozen = self.data.shards, self.data.frozen

    def run(self, x: torch.Tensor, places: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
        """What the layers make of the stream `x` at `places` (T,); with the head their loss, ()."""
        self.tensor.region.share(len(places))
        x = self.model.layers(x, places)
        return self.loss(x, targets, count) if self.loss else x

    def finish(self) -> dict[str, torch.Tensor]:
        """Wait for the gradients' sums, over data and over tensor ranks."""
        return self.tensor.finish(self.data.finish())

    def box(self, name: str) -> tuple[tuple[int, int], ...]:
        """The part of the logical parameter `name` that this rank keeps, and moves: (start, stop) by dim."""
        box = self.tensor.boxes[name]
        if not self.zero or not box:
            return box
        (begin, _), (start, stop) = box[0], self.data.rows[name]
        return (begin + start, begin + stop), *box[1:]


class Chunks:
    """All of a model that one rank trains: its stage's chunks, each of them composed."""

    def __init__(self, config: ModelConfig, mesh, plan: Plan, read: Read):
        p, r, n = mesh.pp.size, mesh.pp.rank, mesh.pp.size * plan.virtual
        borders = split(config, n, config.context)
        parts = [pipeline.cut(empty(config, plan.attention).train(), *borders[i], last=i == n - 1)
                 for i in range(r, n, p)]
        self.each = [Composed(part, mesh, plan, read) for part in parts]
        self.mesh, self.plan = mesh, plan
        self.ends = mesh.ends("pp") if config.tied and p > 1 else None   # who share the tied weight
        self.shards = self._all("shards")
        self.masters = self._all("masters") if self.each[0].masters else None
        self.frozen = self._all("frozen")

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        for chunk in self.each:
            chunk.data.begin_step()

    def finish(self) -> dict[str, torch.Tensor]:
        """{name: summed gradient}, or this rank's rows of it; a tied weight's over both ends of the pipe."""
        grads = {name: grad for chunk in self.each for name, grad in chunk.finish().items()}
        if self.ends and TIED in grads:
            comm.all_reduce(grads[TIED], self.ends, "tied")
        return grads

    def publish(self, frozen: bool = False) -> None:
        """After the optimizer's step: whole weights follow the shards. After a load, `frozen` ones too."""
        for chunk in self.each:
            chunk.data.publish(frozen)

    def norm_axes(self) -> list:
        """The axes whose ranks hold different gradients: their norms add up over these."""
        return [self.mesh.tp, self.mesh.pp, *([self.mesh.data] if self.plan.zero else [])]

    def counts(self, name: str) -> bool:
        """Of the ranks that hold the same part of parameter `name`: does a sum over the axes take mine?"""
        again = self.ends and name == TIED and self.ends.rank > 0
        return not again and self.each[0].tensor.counts(name)

    def box(self, name: str) -> tuple[tuple[int, int], ...]:
        """`Composed.box` of the chunk that has it."""
        return next(chunk for chunk in self.each if name in chunk.shards | chunk.frozen).box(name)

    def tensors(self) -> Iterator[torch.Tensor]:
        """All they hold between steps."""
        for chunk in self.each:
            yield from chunk.data.tensors()

    def _all(self, what):
        return {name: tensor for chunk in self.each for name, tensor in getattr(chunk, what).items()}


TIED = "embed.weight"                        # the head's too, where it is tied


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
