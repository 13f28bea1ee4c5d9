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
from nanoinfra.train.checkpoint.tensor_shards import TensorShard
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.freeze import frozen_parameter_names
from nanoinfra.train.loss_scale import LossScale
from nanoinfra.train.optimizer import (
    ADAMW_BETAS,
    ADAMW_WEIGHT_DECAY,
    MixedPrecisionOptimizer,
    unscale_and_clip_grads,
)
from nanoinfra.train.step import execute_schedule


class TrainStage(PipelineStage):
    """Model, gradients and optimizer of one rank. Implements `step.Stage`.

    `read(name, part)` gives the weights to go on from; without it they are drawn from the seed. Either way no
    rank ever holds more than its own parts, and one parameter.
    """

    def __init__(self, config: ModelConfig, flags: TrainFlags, mesh, read: Read | None = None):
        self.mesh, self.shapes, self.width = mesh, shapes(config), config.width
        self.schedule_name, self.virtual = flags.pipeline.schedule, flags.pipeline.virtual_stages
        dtype = getattr(torch, flags.model.dtype)
        self.parallel_model = Chunks(config, mesh, parallel_config_from_flags(flags, config), read
                                     or initial_weights_reader(config, flags.model.seed))
        super().__init__(mesh.pp, mesh.twin("pp"), self.virtual, dtype, mesh.device, self.schedule_name
                         == "zb-h1")
        o = flags.optimizer
        self.optimizer = MixedPrecisionOptimizer(self.parallel_model.shards, o.optimizer,
                                                 self.parallel_model.masters, o.betas or ADAMW_BETAS,
                                                 ADAMW_WEIGHT_DECAY if o.weight_decay is None
                                                 else o.weight_decay)
        self.max_grad_norm, self.loss_scale = flags.optimizer.clip, LossScale() if dtype == torch.float16 else None
        self.forwards = schedules.evaluate(mesh.pp.size, self.virtual)[mesh.pp.rank]

    def build_step_schedule(self, micro_batches: int) -> list:
        """What this rank does in a step."""
        pp = self.mesh.pp
        return schedules.schedule(self.schedule_name, pp.size, micro_batches, self.virtual)[pp.rank]

    def begin_step(self, batches: list, count: int, lr: float = 0.0) -> None:
        """A new step: its micro-batches [(x (B, T), y (B, T))], valid tokens on all ranks, learning rate."""
        self.micro_batches, self.num_valid_tokens, self.lr = batches, count, lr
        self.loss = torch.zeros((), dtype=torch.float64)
        self.grads = None                    # the last step's, which would live on beside this one's
        self.parallel_model.begin_step()

    def enter(self, micro: int) -> torch.Tensor:
        """The embedded tokens of a micro-batch."""
        model, x = self.parallel_model.each[0].model, self.micro_batches[micro][0].to(self.device)
        return model.start(x, model.places(x))

    def run(self, chunk: int, x: torch.Tensor, micro: int) -> torch.Tensor:
        """A chunk of the layers; after the last one this rank's share of the step's loss."""
        part, (tokens, targets) = self.parallel_model.each[chunk], self.micro_batches[micro]
        y = part.run(x, part.model.places(tokens).to(self.device), targets.to(self.device),
                     self.num_valid_tokens)
        if part.loss:
            self.loss += y.detach().cpu()
        return y

    def stream(self, micro: int) -> tuple[int, ...]:
        """(B, T, C), or under sequence parallelism this rank's share of it."""
        B, T = self.micro_batches[micro][0].shape
        return B, self.parallel_model.each[0].tensor.region.share(T), self.width

    def upstream(self, loss: torch.Tensor) -> torch.Tensor | None:
        """float16's scale."""
        return torch.full_like(loss, self.loss_scale.value) if self.loss_scale else None

    def before_backward(self, chunk: int, last: bool) -> None:
        """The chunk's buckets may leave in its last backward."""
        self.parallel_model.each[chunk].data.before_backward(last)

    def reduce_grads(self) -> None:
        """Wait for the sums over the ranks."""
        self.settle()
        self.grads = self.parallel_model.finish()

    def step(self) -> None:
        """Clip and update; `grad_norm` is the norm before clipping.

        `skipped`: float16 gradients overflowed somewhere; the norm, which all ranks share, is no number then.
        """
        self.grad_norm = unscale_and_clip_grads(self.grads, self.max_grad_norm, self.loss_scale.value
                                                if self.loss_scale else 1.0,
                                                self.parallel_model.norm_axes(), self.parallel_model.counts)
        self.skipped = self.loss_scale is not None and not math.isfinite(self.grad_norm)
        if self.loss_scale:
            self.loss_scale.update(self.skipped)
        if not self.skipped:
            self.optimizer.step(self.grads, self.lr)
            self.parallel_model.publish()

    def grad_norm_metrics(self) -> dict:
        """The step's line of metrics on it: null where float16 overflowed, which skipped the step."""
        norm = {"grad_norm": None if self.skipped else self.grad_norm}
        return norm | {"loss_scale": self.loss_scale.value} if self.loss_scale else norm

    @torch.no_grad()
    def sum_held_out_nats(self, batches: Iterator) -> float:
        """-sum ln p over the valid targets of this rank's held-out batches, where its loss is known."""
        nats = 0.0
        for batch in batches:
            self.begin_step([batch], count=1)
            execute_schedule(self.forwards, self)
            self.settle()
            nats += self.loss.item()
        return nats

    def persistent_tensors(self) -> Iterator[torch.Tensor]:
        """Everything it keeps between steps: weights, gradient buckets, masters, moments."""
        yield from self.parallel_model.tensors()
        yield from self.optimizer.state_dict().values()

    def tensor_shards(self) -> list[tuple[TensorShard, torch.Tensor]]:
        """What a checkpoint keeps of this rank: its parts of the optimizer's state, and of what is frozen."""
        kept = self.optimizer.state_dict() | self.parallel_model.frozen
        pairs = [self._piece(key, tensor) for key, tensor in kept.items()]
        return [(piece, tensor) for piece, tensor in pairs if tensor.numel()]

    def weights_are_finite(self) -> bool:
        """Are all weights of this rank finite numbers?"""
        return all(bool(master.isfinite().all()) for master in self.optimizer.master_weights.values())

    def state_dict(self) -> dict:
        """What else a run needs to go on: the optimizer's count of steps, float16's scale."""
        return {"updates": self.optimizer.num_steps, "scale": self.loss_scale.state_dict() if self.loss_scale
                else None}

    def load_state_dict(self, pairs: Iterable[tuple[TensorShard, torch.Tensor]], state: dict) -> None:
        """Take back what `pieces` and `state` gave, whatever ranks wrote it."""
        tensors = {piece.name: tensor for piece, tensor in pairs}
        for name in tensors.keys() & self.parallel_model.frozen.keys():
            tensor = tensors.pop(name)
            self.parallel_model.frozen[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        self.optimizer.load_state_dict(tensors, state["updates"])
        if self.loss_scale and state["scale"]:
            self.loss_scale.load_state_dict(state["scale"])
        self.parallel_model.publish(frozen=True)

    def _piece(self, key, tensor):
        name = key.rpartition("/")[2]
        box = self.parallel_model.box(name)
        size = tuple(stop - start for start, stop in box)
        piece = TensorShard(key, tuple(start for start, _ in box), size, self.shapes[name])
        return piece, tensor.view(-1)[:math.prod(size)].view(size)         # zeros follow in ZeRO's last

def parallel_config_from_flags(flags: TrainFlags, config: ModelConfig) -> Plan:
    """What the flags ask for besides the mesh; gradients are summed in at least float32 by default."""
    dtype, asked = getattr(torch, flags.model.dtype), flags.model.grad_dtype
    grad_dtype = getattr(torch, asked) if asked else torch.promote_types(dtype, torch.float32)
    mesh = flags.mesh
    sp = "none" if not mesh.sp else "keep" if mesh.sp_save_gathered else "gather"
    frozen = frozen_parameter_names(flags.model.freeze, config, mesh.pp * flags.pipeline.virtual_stages)
    return Plan(sp, mesh.zero, flags.model.recompute, mesh.grad_sync, dtype, grad_dtype,
                flags.pipeline.virtual_stages, flags.model.attention, frozen)


def initial_weights_reader(config: ModelConfig, seed: int) -> Read:
    """(name, part) -> first weights (float32): of the numbers `init_weights` draws for it, a part."""
    every = shapes(config)
    return lambda name, part: draw(name, every[name], config.layers, seed)[part]
