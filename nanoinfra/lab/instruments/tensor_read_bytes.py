"""Bytes that operators read of some tensors: weights, or a KV cache.

    with Traffic(weights=model.parameters(), cache=[memory]) as traffic:
        model(tokens)
    traffic.read_bytes["weights"]

Counted is the size of the view that an operator is given, each time it is; not what it writes in place, and
not a look-up (`embedding`), which reads a few rows. Meta tensors count as well.
"""
from collections import Counter
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorReadBytes(TorchDispatchMode):
    """A context that adds up `read_bytes`, {name: bytes}, by the name under which tensors were given."""

    def __init__(self, **named_tensors: Iterable[torch.Tensor]):
        super().__init__()
        self.read_bytes = Counter()
        # the tensors stay alive, so that no other one gets the address of their storage
        self._of = {name: [*tensors] for name, tensors in named_tensors.items()}
        self._names = {_key(tensor): name for name, tensors in self._of.items() for tensor in tensors}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not _is_view(op) and op.overloadpacket is not torch.ops.aten.embedding:
            for tensor in _given(op, args, kwargs or {}):
                if name := self._names.get(_key(tensor)):
                    self.read_bytes[name] += tensor.nbytes
        return op(*args, **(kwargs or {}))


def _is_view(op):
    return any(out.alias_info is not None and not out.alias_info.is_write for out in op._schema.returns)


def _given(op, args, kwargs):
    """Tensors that `op` reads and does not write."""
    slots = {slot.name: slot for slot in op._schema.arguments}
    named = [*zip(slots.values(), args), *((slots[name], value) for name, value in kwargs.items())]
    values = [value for slot, value in named if slot.alias_info is None or not slot.alias_info.is_write]
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def _key(tensor):
    return tensor.untyped_storage()._cdata           # the same for all views of it, on the meta device too
