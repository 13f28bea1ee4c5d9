"""What the executor drives: one rank's share of a training, a whole model or a pipeline's chunks of it.

Forward keeps a micro-batch's stream or loss, backward frees it, gradients are summed as
parallel/parallelize.py has arranged it, the optimizer moves float32 masters, whole or in parts. The loss is
divided by the step's global count of valid tokens before any backward, so nothing is divided afterwards; in
float16 it is multiplied by a scale on the way, and a step whose gradients overflow on any rank is skipped on
all.
"""
import math
from collections.abc import Iterable, Iterator

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.parameters import shapes
from nanoinfra.model.init import draw
from nanoinfra.model.weights.fill_model import Read
from nanoinfra.parallel.parallelize import Chunks, Plan
from nanoinfra.parallel.pipeline import schedules
from nanoinfra.parallel.pipeline.stage import PipelineStage
from nanoinfra.train.checkpoint.tensor_shards import Piece
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.freeze import frozen_names
from nanoinfra.train.loss_scale import LossScale
from nanoinfra.train.optimizer import BETAS, WEIGHT_DECAY, Optimizer, clip
from nanoinfra.train.step import execute


class Replica(PipelineStage):
    """Model, gradients and optimizer of one rank. Implements `step.Stage`.

    `read(name, part)` gives the weights to go on from; without it they are drawn from the seed. Either way no
    rank ever holds more than its own parts, and one parameter.
    """

    def __init__(self, config: ModelConfig, flags: TrainFlags, mesh, read: Read | None = None):
        self.mesh, self.shapes, self.width = mesh, shapes(config), config.width
        self.kind, self.virtual = flags.pipeline.schedule, flags.pipeline.virtual
        dtype = getattr(torch, flags.model.dtype)
        self.parallel = Chunks(config, mesh, plan(flags, config), read or drawn(config, flags.model.seed))
        super().__init__(mesh.pp, mesh.twin("pp"), self.virtual, dtype, mesh.device, self.kind == "zb-h1")
        o = flags.optimizer
        self.optimizer = Optimizer(self.parallel.shards, o.optimizer, self.parallel.masters, o.betas or BETAS,
                                   WEIGHT_DECAY if o.weight_decay is None else o.weight_decay)
        self.limit, self.scale = flags.optimizer.clip, LossScale() if dtype == torch.float16 else None
        self.forwards = schedules.evaluate(mesh.pp.size, self.virtual)[mesh.pp.rank]

    def schedule(self, micro_batches: int) -> list:
        """What this rank does in a step."""
        pp = self.mesh.pp
        return schedules.schedule(self.kind, pp.size, micro_batches, self.virtual)[pp.rank]

    def begin(self, batches: list, count: int, lr: float = 0.0) -> None:
        """A new step: its micro-batches [(x (B, T), y (B, T))], valid tokens on all ranks, learning rate."""
        self.batches, self.count, self.lr = batches, count, lr
        self.loss = torch.zeros((), dtype=torch.float64)
        self.grads = None                    # the last step's, which would live on beside this one's
        self.parallel.begin_step()

    def enter(self, micro: int) -> torch.Tensor:
        """The embedded tokens of a micro-batch."""
        model, x = self.parallel.each[0].model, self.batches[micro][0].to(self.device)
        return model.start(x, model.places(x))

    def run(self, chunk: int, x: torch.Tensor, micro: int) -> torch.Tensor:
        """A chunk of the layers; after the last one this rank's share of the step's loss."""
        part, (tokens, targets) = self.parallel.each[chunk], self.batches[micro]
        y = part.run(x, part.model.places(tokens).to(self.device), targets.to(self.device), self.count)
        if part.loss:
            self.loss += y.detach().cpu()
        return y

    def stream(self, micro: int) -> tuple[int, ...]:
        """(B, T, C), or under sequence parallelism this rank's share of it."""
        B, T = self.batches[micro][0].shape
        return B, self.parallel.each[0].tensor.region.share(T), self.width

    def upstream(self, loss: torch.Tensor) -> torch.Tensor | None:
        """float16's scale."""
        return torch.full_like(loss, self.scale.value) if self.scale else None

    def before_backward(self, chunk: int, last: bool) -> None:
        """The chunk's buckets may leave in its last backward."""
        self.parallel.each[chunk].data.before_backward(last)

    def reduce_grads(self) -> None:
        """Wait for the sums over the ranks."""
        self.settle()
        self.grads = self.parallel.finish()

    def step(self) -> None:
        """Clip and update; `grad_norm` is the norm before clipping.

        `skipped`: float16 gradients overflowed somewhere; the norm, which all ranks share, is no number then.
        """
        self.grad_norm = clip(self.grads, self.limit, self.scale.value if self.scale else 1.0,
                              self.parallel.norm_axes(), self.parallel.counts)
        self.skipped = self.scale is not None and not math.isfinite(self.grad_norm)
        if self.scale:
            self.scale.update(self.skipped)
        if not self.skipped:
            self.optimizer.step(self.grads, self.lr)
            self.parallel.publish()

    def norm(self) -> dict:
        """The step's line of metrics on it: null where float16 overflowed, which skipped the step."""
        norm = {"grad_norm": None if self.skipped else self.grad_norm}
        return norm | {"loss_scale": self.scale.value} if self.scale else norm

    @torch.no_grad()
    def nats(self, batches: Iterator) -> float:
        """-sum ln p over the valid targets of this rank's held-out batches, where its loss is known."""
        nats = 0.0
        for batch in batches:
            self.begin([batch], count=1)
            execute(self.forwards, self)
            self.settle()
            nats += self.loss.item()
        return nats

    def tensors(self) -> Iterator[torch.Tensor]:
        """Everything it keeps between steps: weights, gradient buckets, masters, moments."""
        yield from self.parallel.tensors()
        yield from self.optimizer.state().values()

    def pieces(self) -> list[tuple[Piece, torch.Tensor]]:
        """What a checkpoint keeps of this rank: its parts of the optimizer's state, and of what is frozen."""
        kept = self.optimizer.state() | self.parallel.frozen
        pairs = [self._piece(key, tensor) for key, tensor in kept.items()]
        return [(piece, tensor) for piece, tensor in pairs if tensor.numel()]

    def is_finite(self) -> bool:
        """Are all weights of this rank finite numbers?"""
        return all(bool(master.isfinite().all()) for master in self.optimizer.masters.values())

    def state(self) -> dict:
        """What else a run needs to go on: the optimizer's count of steps, float16's scale."""
        return {"updates": self.optimizer.steps, "scale": self.scale.state() if self.scale else None}

    def load(self, pairs: Iterable[tuple[Piece, torch.Tensor]], state: dict) -> None:
        """Take back what `pieces` and `state` gave, whatever ranks wrote it."""
        tensors = {piece.name: tensor for piece, tensor in pairs}
        for name in tensors.keys() & self.parallel.frozen.keys():
            tensor = tensors.pop(name)
            self.parallel.frozen[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        self.optimizer.load(tensors, state["updates"])
        if self.scale and state["scale"]:
            self.scale.load(state["scale"])
        self.parallel.publish(frozen=True)

    def _piece(self, key, tensor):
        name = key.rpartition("/")[2]
        box = self.parallel.box(name)
        size = tuple(stop - start for start, stop in box)
        piece = Piece(key, tuple(start for start, _ in box), size, self.shapes[name])
        return piece, tensor.view(-1)[:math.prod(size)].view(size)         # zeros follow in ZeRO's last

def plan(flags: TrainFlags, config: ModelConfig) -> Plan:
    """What the flags ask for besides the mesh; gradients are summed in at least float32 by default."""
    dtype, asked = getattr(torch, flags.model.dtype), flags.model.grad_dtype
    grad_dtype = getattr(torch, asked) if asked else torch.promote_types(dtype, torch.float32)
    mesh = flags.mesh
    sp = "none" if not mesh.sp else "keep" if mesh.sp_keep else "gather"
    frozen = frozen_names(flags.model.freeze, config, mesh.pp * flags.pipeline.virtual)
    return Plan(sp, mesh.zero, flags.model.recompute, mesh.data_parallel, dtype, grad_dtype,
                flags.pipeline.virtual, flags.model.attention, frozen)


def drawn(config: ModelConfig, seed: int) -> Read:
    """(name, part) -> first weights (float32): of the numbers `init_weights` draws for it, a part."""
    every = shapes(config)
    return lambda name, part: draw(name, every[name], config.layers, seed)[part]
