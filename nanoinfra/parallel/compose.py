"""Apply a plan of parallelism to a plain model, in one fixed order.

First recompute, because it replaces what a block runs while the block stays what others hook; then data
parallelism or ZeRO, which must see the parameters as they are finally cut. Tensor, context and pipeline
parallelism will come before both; what does not exist yet is refused in train/config.py before any rank
starts. Every technique composes through the mesh alone.
"""
from collections.abc import Callable

import torch
from torch import nn

from nanoinfra.memory import recompute
from nanoinfra.parallel.data import DataParallel
from nanoinfra.parallel.zero import Zero


def apply(model: nn.Module, mesh, last: nn.Module, zero: int = 0, recomputed: str = "none",
          data_parallel: str = "overlap", dtype: torch.dtype | None = None,
          grad_dtype: torch.dtype | None = None,
          source: Callable[[str], torch.Tensor] | None = None) -> DataParallel | Zero:
    """Make `model` this rank's part of `mesh.data.size` replicas; returns what collects its gradients.

    `last` is the module that uses the head's weight, `zero` ZeRO's stage, where 0 is plain data parallelism.
    `dtype` is what to compute in; `source(name)` gives first weights where the model has none yet.
    """
    recompute.apply(model, recomputed)
    if zero:
        return Zero(model, mesh.data, zero, units(model, last), dtype, grad_dtype, source=source)
    return DataParallel(model.to(dtype), mesh.data, data_parallel, grad_dtype=grad_dtype)


def units(model: nn.Module, last: nn.Module) -> list[list[nn.Module]]:
    """What ZeRO-3 gathers together: the embeddings, each block, and the norm with `last`, head and loss."""
    embeddings = [module for name, module in model.named_children() if name in ("embed", "positions")]
    return [embeddings, *([block] for block in model.blocks), [model.norm, last]]
