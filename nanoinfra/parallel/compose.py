"""Apply a plan of parallelism to a plain model, in one fixed order.

The order today: the model is built and filled by name, then data parallelism wraps its gradients. Tensor,
context and pipeline parallelism come before it, because it must see the parameters as they are finally cut;
what does not exist yet is refused in train/config.py before any rank starts.
Every technique composes through the mesh alone.
"""
import torch
from torch import nn

from nanoinfra.parallel.data import DataParallel


def apply(model: nn.Module, mesh, data_parallel: str = "overlap",
          grad_dtype: torch.dtype | None = None) -> DataParallel:
    """Make `model` one of `mesh.data.size` replicas; returns what collects its gradients."""
    return DataParallel(model, mesh.data, data_parallel, grad_dtype=grad_dtype)
