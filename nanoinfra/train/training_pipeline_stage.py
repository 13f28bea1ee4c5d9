"""One rank's training state: its model chunks, gradients, optimizer and loss scale.

Forward keeps a micro-batch's hidden states or loss and backward frees them; gradients are summed as
parallel/parallelize.py arranges it; the optimizer updates float32 master weights, whole or sharded (mixed
precision). The objective's loss is divided by a number of the whole step, known before backward (loss.py). In
float16 it is multiplied by the loss scale, and a step whose gradients overflow on any rank is skipped on all.
"""
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch, check_batch
from nanoinfra.formulas.parameters import TensorShard, parameter_shapes
from nanoinfra.model.initialization import draw_initial_tensor
from nanoinfra.model.weights.read_weights_into_decoder import ReadParameter
from nanoinfra.parallel.parallelize import ParallelConfig, ParallelModel
from nanoinfra.parallel.pipeline import schedules
from nanoinfra.parallel.pipeline.stage import PipelineStage
from nanoinfra.train.config import TrainFlags
from nanoinfra.train.frozen_parameters import frozen_parameter_names
from nanoinfra.train.loss import MEAN_CROSS_ENTROPY, Objective, apply_objective, check_objective
from nanoinfra.train.loss_scale import LossScale
from nanoinfra.train.optimizer import (
    ADAMW_BETAS,
    ADAMW_WEIGHT_DECAY,
    MixedPrecisionOptimizer,
    OptimizerGroup,
    unscale_and_clip_grads,
)
from nanoinfra.train.step import execute_schedule


class TrainStage(PipelineStage):
    """The model chunks, gradients and optimizer of one rank; implements step.StageProtocol.

    `read_parameter(name, slices)` gives the weights to start from; without it they are drawn from the seed.
    Either way a rank never holds more than its own shards and one whole parameter. `objective` makes the
    loss; one that cannot is refused with ValueError.
    """

    def __init__(self, config: ModelConfig, flags: TrainFlags, mesh,
                 read_parameter: ReadParameter | None = None, objective: Objective = MEAN_CROSS_ENTROPY,
                 optimizer_groups: dict[str, OptimizerGroup] | None = None):
        self.mesh, self.objective = mesh, objective
        check_objective(objective)
        self.width, self.context = config.width, config.context
        self.schedule_name, self.virtual = flags.pipeline.schedule, flags.pipeline.virtual_stages
        dtype = getattr(torch, flags.model.dtype)
        read_parameter = read_parameter or initial_weights_reader(config, flags.model.seed)
        self.parallel_model = ParallelModel(config, mesh, parallel_config_from_flags(flags, config),
                                            read_parameter)
        super().__init__(mesh.pp, mesh.duplicate_axis("pp"), self.virtual, dtype, mesh.device,
                         self.schedule_name == "zb-h1")
        o = flags.optimizer
        weight_decay = ADAMW_WEIGHT_DECAY if o.weight_decay is None else o.weight_decay
        self.optimizer = MixedPrecisionOptimizer(self.parallel_model.param_shards, o.optimizer,
                                                 self.parallel_model.master_weights, o.betas or ADAMW_BETAS,
                                                 weight_decay, optimizer_groups)
        self.lr = 0.0
        self._all_grads_came = False
        self.max_grad_norm = flags.optimizer.clip
        self.loss_scale = LossScale() if dtype == torch.float16 else None
        self.forward_schedule = schedules.forward_only_schedule(mesh.pp.size, self.virtual)[mesh.pp.rank]

    def build_step_schedule(self, num_micro_batches: int) -> list:
        """This rank's instructions for one step of `num_micro_batches` micro-batches."""
        pp = self.mesh.pp
        return schedules.build_pipeline_schedule(self.schedule_name, pp.size, num_micro_batches,
                                                 self.virtual)[pp.rank]

    def sum_normalizers(self, micro_batches: Iterable[Batch]) -> float:
        """This rank's share of what the step's loss is divided by; `begin_step` takes the sum over ranks."""
        return float(sum(self.objective.normalizer(batch) for batch in micro_batches))

    def begin_step(self, micro_batches: list[Batch], normalizer_total: float, lr: float | None = None,
                   objective: Objective | None = None) -> None:
        """Begin a step on this rank's `micro_batches`; `normalizer_total` is the sum over all ranks.

        With the default objective that is the number of valid targets, or the sum of their weights. `lr` is
        the learning rate of the optimizer's step; None keeps the last step's. `objective` replaces the
        stage's for this step. Raises ValueError for a micro-batch that contradicts itself.
        """
        for batch in micro_batches:
            check_batch(batch, self.context)
        self.micro_batches = [batch.to(self.device) for batch in micro_batches]
        self.normalizer_total, self.step_objective = normalizer_total, objective or self.objective
        self.lr = self.lr if lr is None else lr
        self.loss = torch.zeros((), dtype=torch.float64)
        self.grads = None                    # frees the last step's gradients before new ones are made
        self.parallel_model.zero_grad()

    def embed_input(self, micro: int) -> torch.Tensor:
        """Embed the tokens of micro-batch number `micro`."""
        return self.parallel_model.chunks[0].embed_batch(self.micro_batches[micro])

    def forward_chunk(self, chunk: int, x: torch.Tensor, micro: int) -> torch.Tensor:
        """Run one chunk of the layers; the last chunk returns this rank's share of the step's loss."""
        part, batch = self.parallel_model.chunks[chunk], self.micro_batches[micro]
        y = part.forward_chunk(x, batch)
        if not part.loss_head:
            return y                                                                 # (B, T, C)
        loss = apply_objective(self.step_objective, y, batch, self.normalizer_total)
        self.loss += loss.detach().cpu()
        return loss

    def activation_shape(self, micro: int) -> tuple[int, ...]:
        """The shape (B, T, C) of the hidden states between stages; T is this rank's part under --sp."""
        B, T = self.micro_batches[micro].tokens.shape
        return B, self.parallel_model.chunks[0].tensor_parallel.region.local_seq_len(T), self.width

    def loss_grad(self, loss: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the loss that backward starts from: the loss scale in float16, else None (1)."""
        return torch.full_like(loss, self.loss_scale.value) if self.loss_scale else None

    def prepare_for_backward(self, chunk: int, is_last: bool) -> None:
        """Let the chunk's gradient buckets be sent during its last backward of the step."""
        self.parallel_model.chunks[chunk].data_parallel.prepare_for_backward(is_last)

    def reduce_grads(self) -> None:
        """Wait until all gradients are summed over the ranks.

        Raises RuntimeError in the first step if a parameter that is trained has got none on this rank.
        """
        self.wait_sends()
        self.grads = self.parallel_model.finish_grad_sync()
        if not self._all_grads_came and (names := self.parallel_model.names_without_grad()):
            raise RuntimeError(f"no gradient came for {', '.join(names)}: nothing in the model uses them; "
                               "freeze them (--freeze), or let a port of their layer apply them")
        self._all_grads_came = True

    def step(self) -> None:
        """Unscale and clip the gradients and update the weights; `grad_norm` is the norm before clipping.

        `skipped` is True when float16 gradients overflowed on any rank: the norm is then not finite anywhere.
        """
        scale = self.loss_scale.value if self.loss_scale else 1.0
        model = self.parallel_model
        self.grad_norm = unscale_and_clip_grads(self.grads, self.max_grad_norm, scale, model.grad_norm_axes(),
                                                model.counted_in_norm)
        self.skipped = self.loss_scale is not None and not math.isfinite(self.grad_norm)
        if self.loss_scale:
            self.loss_scale.update(self.skipped)
        if not self.skipped:
            self.optimizer.step(self.grads, self.lr)
            self.parallel_model.all_gather_params()

    def grad_norm_metrics(self) -> dict:
        """The gradient norm and loss scale for metrics.jsonl; the norm is null when the step was skipped."""
        norm = {"grad_norm": None if self.skipped else self.grad_norm}
        return norm | {"loss_scale": self.loss_scale.value} if self.loss_scale else norm

    @torch.no_grad()
    def sum_held_out_nats(self, micro_batches: Iterable[Batch]) -> float:
        """Return -sum ln p over the valid targets of held-out `micro_batches`; 0 before the last stage.

        It does not depend on the objective that is trained.
        """
        nats = 0.0
        for micro_batch in micro_batches:
            self.begin_step([micro_batch], normalizer_total=1, objective=MEAN_CROSS_ENTROPY)
            execute_schedule(self.forward_schedule, self)
            self.wait_sends()
            nats += self.loss.item()
        return nats

    def persistent_tensors(self) -> Iterator[torch.Tensor]:
        """The tensors kept between steps: weights, gradient buckets, master weights, optimizer moments."""
        yield from self.parallel_model.persistent_tensors()
        yield from self.optimizer.state_dict().values()

    def tensor_shards(self) -> list[tuple[TensorShard, torch.Tensor]]:
        """This rank's shards for a checkpoint: master weights, moments and frozen parameters."""
        kept = self.optimizer.state_dict() | self.parallel_model.frozen_params
        pairs = [self._shard(key, tensor) for key, tensor in kept.items()]
        return [(shard, tensor) for shard, tensor in pairs if tensor.numel()]

    def weights_are_finite(self) -> bool:
        """Return whether all weights of this rank are finite numbers."""
        return all(bool(master.isfinite().all()) for master in self.optimizer.master_weights.values())

    def state_dict(self) -> dict:
        """The state that is no tensor, for state.json: the optimizer's step count and the loss scale."""
        scale = self.loss_scale.state_dict() if self.loss_scale else None
        return {"updates": self.optimizer.num_steps, "scale": scale}

    def load_state_dict(self, shards: Iterable[tuple[TensorShard, torch.Tensor]], state: dict) -> None:
        """Restore what `tensor_shards` and `state_dict` gave, whatever mesh wrote it."""
        tensors = {shard.name: tensor for shard, tensor in shards}
        for name in tensors.keys() & self.parallel_model.frozen_params.keys():
            tensor = tensors.pop(name)
            self.parallel_model.frozen_params[name].view(-1)[:tensor.numel()].copy_(tensor.view(-1))
        self.optimizer.load_state_dict(tensors, state["updates"])
        if self.loss_scale and state["scale"]:
            self.loss_scale.load_state_dict(state["scale"])
        self.parallel_model.all_gather_params(include_frozen=True)

    def _shard(self, key, tensor):
        shard = replace(self.parallel_model.optimizer_shard(key.rpartition("/")[2]), name=key)
        return shard, tensor.view(-1)[:math.prod(shard.size)].view(shard.size)   # without ZeRO's padding


def parallel_config_from_flags(flags: TrainFlags, config: ModelConfig) -> ParallelConfig:
    """Translate the flags into a parallel configuration; gradients are summed in >= float32 by default."""
    dtype, asked = getattr(torch, flags.model.dtype), flags.model.grad_dtype
    grad_dtype = getattr(torch, asked) if asked else torch.promote_types(dtype, torch.float32)
    axes, memory = flags.axes, flags.memory
    sp = "none" if not axes.sp else "keep" if memory.sp_save_gathered else "gather"
    frozen = frozen_parameter_names(flags.model.freeze, config, axes.pp * flags.pipeline.virtual_stages)
    return ParallelConfig(sp, memory.zero, memory.recompute, axes.grad_sync, dtype, grad_dtype,
                          flags.pipeline.virtual_stages, flags.model.attention, frozen)


def initial_weights_reader(config: ModelConfig, seed: int) -> ReadParameter:
    """Return read(name, slices) -> those slices of the float32 initial weights, drawn from seed and name."""
    full_shapes = parameter_shapes(config)
    return lambda name, slices: draw_initial_tensor(name, full_shapes[name], config.layers, seed)[slices]
