"""Count the activations that autograd saves for backward: each storage once, without the weights.

    with SavedActivations(model.parameters()) as saved:
        loss = model(x)
    saved.saved_bytes()

Autograd passes each tensor that it saves to a hook (saved_tensors_hooks), and weak references tell which of
them are still alive. Meta tensors count as well, so that a model of any size is counted at once.
"""
import weakref
from collections.abc import Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedActivations(saved_tensors_hooks):
    """A context that counts tensors saved by a forward, or by the recomputation inside a backward."""

    def __init__(self, weights: Iterable[torch.Tensor] = ()):
        super().__init__(self._keep, lambda tensor: tensor)
        self.peak_bytes = self._bytes = 0            # the most that were saved at any moment; those of now
        self._weights = {_storage(weight) for weight in weights}
        self._refs = {}                              # {storage: {id: weak reference to a tensor of it}}

    def __enter__(self):
        super().__enter__()
        return self

    def saved_bytes(self) -> int:
        """Bytes of the storages that are saved now."""
        return self._bytes

    def saved_tensors(self) -> list[torch.Tensor]:
        """A tensor for each storage that is saved now, in the order in which they were saved."""
        return [next(iter(refs.values()))() for refs in self._refs.values()]

    def _keep(self, tensor):
        at, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if at not in self._weights:
            ref = weakref.ref(tensor, lambda ref: self._free(at, size, ref))
            self._bytes += 0 if at in self._refs else size
            self._refs.setdefault(at, {})[id(ref)] = ref
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        return tensor

    def _free(self, at, size, ref):
        self._refs[at].pop(id(ref))
        if not self._refs[at]:
            del self._refs[at]
            self._bytes -= size


def _storage(tensor):
    return tensor.untyped_storage()._cdata           # the same for all views of it, on the meta device too
