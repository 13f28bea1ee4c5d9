"""Gradient parity: compare the gradients of a training step on a mesh of ranks with those of one rank.

Each rank runs the trainer's own stage (train/training_pipeline_stage.py) in float64. The error of a gradient
is the design's measure, ||got - want|| / max(||want||, 1e-6 ||all gradients||), of each rank's part against
the whole.
"""
from collections.abc import Callable, Sequence
from math import inf, prod

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.train.config import TrainFlags, make_train_flags
from nanoinfra.train.step import execute_schedule
from nanoinfra.train.training_pipeline_stage import TrainStage


def float64_train_flags(axis_sizes: dict[str, int], micro_batch: int, global_batch: int) -> TrainFlags:
    """Flags of a float64 step on pp x dp x tp ranks, given as {axis: size}."""
    return make_train_flags(dtype="float64", micro_batch=micro_batch, global_batch=global_batch, **axis_sizes)


def run_gradient_step(config: ModelConfig, flags: TrainFlags, seq: int,
                      norm_function: Callable | None = None) -> dict:
    """Run one training step on each rank of the mesh that `flags` describe; returns this rank's results.

    "at": {axis: rank on it}; "grads": {name: (TensorShard, part)}; "rows": records of all collectives until
    the gradients are summed; "loss"; "norm": the trainer's gradient norm; "own": what `norm_function(grads,
    mesh, ends)` returns.
    """
    mesh = make_mesh_from_flags(flags)
    replica, batches = make_stage_and_batches(config, flags, mesh, seq)
    mesh.comm_log.take_records()
    replica.begin_step(batches, count_valid_targets(flags.data.global_batch, seq))
    execute_schedule(replica.build_step_schedule(len(batches))[:-1],
                     replica)                # all but the optimizer's step
    rows, grads = mesh.comm_log.take_records(), {}
    for name, grad in replica.grads.items():
        shard = replica.parallel_model.optimizer_shard(name)
        own = grad.reshape(-1)[:prod(shard.size)].view(shard.size)       # ZeRO's last has zeros after it
        grads[name] = shard, own.clone()
    own = norm_function(replica.grads, mesh, mesh.first_last_subgroup("pp")) if norm_function else None
    replica.step()
    at = {axis: getattr(mesh, axis).rank for axis in ("tp", "pp", "dp")}
    return {"at": at, "grads": grads, "rows": rows, "norm": replica.grad_norm,
            "own": own, "loss": replica.loss.item()}


def make_stage_and_batches(config: ModelConfig, flags: TrainFlags, mesh,
                           seq: int) -> tuple[TrainStage, list[Batch]]:
    """This rank's training stage, and its micro-batches of random token ids, (B, T) each.

    Sequence g of the step has `seq` - g % `seq` valid targets, so that data-parallel ranks have different
    numbers.
    """
    x, y = torch.randint(config.vocab, (2, flags.data.global_batch, seq),
                         generator=torch.Generator().manual_seed(0))     # (G, T)
    for g, row in enumerate(y):
        row[:g % seq] = IGNORE_INDEX
    x, y = (part[mesh.data.rank::mesh.data.size].split(flags.data.micro_batch) for part in (x, y))
    return TrainStage(config, flags, mesh), list(map(Batch, x, y))


def count_valid_targets(sequences: int, seq: int) -> int:
    """The number of valid targets of `sequences` sequences of `make_stage_and_batches`, on all ranks."""
    return sum(seq - g % seq for g in range(sequences))


def relative_gradient_errors(rank_gradients: Sequence[dict],
                             reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """{name: the largest relative error of any rank's part of that gradient}.

    `rank_gradients` has each rank's {name: (TensorShard, part)}, `reference` the whole gradients. The floor
    of 1e-6 ||all|| is for gradients that are zero except for rounding.
    """
    floor, found = 1e-6 * torch.stack([grad.norm() for grad in reference.values()]).norm(), {}
    for name, (shard, part) in (item for each in rank_gradients for item in each.items()):
        whole = reference[name]
        off = (part - whole[shard.slices_within()]).norm() / max(whole.norm(), floor)
        found[name] = max(off.item(), found.get(name, 0.0))
    return found


def largest_gradient_error(rank_gradients: Sequence[dict], reference: dict[str, torch.Tensor]) -> float:
    """The largest of `relative_gradient_errors`; infinite if some part of a gradient is on no rank."""
    seen = {name: torch.zeros(grad.shape) for name, grad in reference.items()}
    for name, (shard, _) in (item for each in rank_gradients for item in each.items()):
        seen[name][shard.slices_within()] = 1
    whole = all(covered.all() for covered in seen.values())
    return max(relative_gradient_errors(rank_gradients, reference).values()) if whole else inf


def make_mesh_from_flags(flags: TrainFlags, wire: dict[str, tuple[float, float]] | None = None) -> Mesh:
    """The mesh of pp x dp x tp ranks that `flags` describe; `wire` emulates links, {axis: (s, bytes/s)}."""
    return Mesh(flags.axes.pp, flags.axes.dp, tp=flags.axes.tp, emulated_links=wire)
