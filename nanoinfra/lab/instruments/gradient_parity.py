"""Parity of gradients: a step of the trainer's own stage on a mesh of ranks, against that of one rank.
"""
from collections.abc import Callable, Sequence
from math import inf, prod

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.data.sample_order import IGNORE
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.train.config import DataFlags, MeshFlags, ModelFlags, TrainFlags
from nanoinfra.train.step import execute
from nanoinfra.train.train_stage import Replica


def float64_train_flags(sizes: dict[str, int], batch: int, sequences: int) -> TrainFlags:
    """A float64 step on pp x dp x tp ranks, `sizes`: `sequences` in micro-batches of `batch`."""
    data = DataFlags(micro_batch=batch, global_batch=sequences)
    return TrainFlags(ModelFlags(dtype="float64"), data, MeshFlags(**sizes))


def run_gradient_step(config: ModelConfig, flags: TrainFlags, seq: int, norm: Callable | None = None) -> dict:
    """On each of the ranks that `flags` name, of a step: where it stands, what it has and what it sent.

    "grads": {name: (box, part)}; "rows": the ledger's, until all gradients are summed; "norm": the trainer's,
    and "own" what `norm(grads, mesh, ends)` says of the same gradients.
    """
    mesh = make_mesh(flags)
    replica, batches = make_stage_and_batches(config, flags, mesh, seq)
    mesh.ledger.take()
    replica.begin(batches, count_valid_targets(flags.data.global_batch, seq))
    execute(replica.schedule(len(batches))[:-1], replica)                # all but the optimizer's step
    rows, grads = mesh.ledger.take(), {}
    for name, grad in replica.grads.items():
        box = replica.parallel.box(name)
        size = [stop - start for start, stop in box]
        grads[name] = box, grad.reshape(-1)[:prod(size)].view(size).clone()      # ZeRO's last has zeros after
    own = norm(replica.grads, mesh, mesh.ends("pp")) if norm else None
    replica.step()
    at = {axis: getattr(mesh, axis).rank for axis in ("tp", "pp", "dp")}
    return {"at": at, "grads": grads, "rows": rows, "norm": replica.grad_norm,
            "own": own, "loss": replica.loss.item()}


def make_stage_and_batches(config: ModelConfig, flags: TrainFlags, mesh, seq: int) -> tuple[Replica, list]:
    """The trainer's stage of this rank, and its data rank's micro-batches [(x, y)], (B, T) each.

    Sequence g of the step has `seq` - g % `seq` valid targets: data ranks have different numbers of them.
    """
    x, y = torch.randint(config.vocab, (2, flags.data.global_batch, seq),
                         generator=torch.Generator().manual_seed(0))     # (G, T)
    for g, row in enumerate(y):
        row[:g % seq] = IGNORE
    x, y = (part[mesh.data.rank::mesh.data.size].split(flags.data.micro_batch) for part in (x, y))
    return Replica(config, flags, mesh), list(zip(x, y))


def count_valid_targets(sequences: int, seq: int) -> int:
    """Valid targets of the step of `stage_of`, on all ranks."""
    return sum(seq - g % seq for g in range(sequences))


def relative_gradient_errors(parts: Sequence[dict], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """{name: the largest error of any rank's part of that gradient}: ||got - want|| / max(||want||, floor).

    `parts` are ranks' {name: (box, part)}, `want` whole gradients. The floor, 1e-6 ||all||, is for those that
    are zero but for rounding.
    """
    floor, found = 1e-6 * torch.stack([grad.norm() for grad in want.values()]).norm(), {}
    for name, (box, part) in (item for each in parts for item in each.items()):
        whole = want[name]
        off = (part - whole[tuple(slice(*ends) for ends in box)]).norm() / max(whole.norm(), floor)
        found[name] = max(off.item(), found.get(name, 0.0))
    return found


def largest_gradient_error(parts: Sequence[dict], want: dict[str, torch.Tensor]) -> float:
    """The largest of `errors`; infinite where no rank has some part."""
    seen = {name: torch.zeros(grad.shape) for name, grad in want.items()}
    for name, (box, _) in (item for each in parts for item in each.items()):
        seen[name][tuple(slice(*ends) for ends in box)] = 1
    whole = all(covered.all() for covered in seen.values())
    return max(relative_gradient_errors(parts, want).values()) if whole else inf


def make_mesh(flags: TrainFlags, wire: dict[str, tuple[float, float]] | None = None) -> Mesh:
    """The mesh of pp x dp x tp ranks that `flags` name, with an emulated wire."""
    return Mesh(flags.mesh.pp, flags.mesh.dp, tp=flags.mesh.tp, wire=wire)
