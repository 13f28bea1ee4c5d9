"""Bytes that tensors hold at any moment: every storage made in this thread and still alive, counted once.

    with Storages(of=model.parameters()) as storages:
        storages.watch(model, mesh.ledger)         # marks at module and communication boundaries
        step()

Saved tensors and collectives under way are seen too, which only C++ holds; a kernel's own scratch is not.
gloo's thread may hold the buffers of a collective for a moment after it is done, and then they count.
"""
from collections.abc import Iterable
from contextlib import ExitStack
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """While it is on, remembers the storage of each operator's results by a weak reference.

    Older storages count only if a tensor of theirs is in `of`; meta tensors and memory lent by numpy never.
    """

    def __init__(self, of: Iterable[torch.Tensor] = (), operators: bool = False):
        super().__init__()
        self.operators = operators                 # mark after each one: slow
        self.marks: list[tuple[str, int]] = []     # (label, bytes held then)
        self._alive, self._undo = WeakValueDictionary(), ExitStack()
        self._remember(of)

    def held(self) -> int:
        """Bytes of the storages alive now, each at its size of now."""
        return sum(storage.nbytes() for storage in self._alive.values())

    def mark(self, label: str) -> None:
        """Append what is held now to `marks`."""
        self.marks.append((label, self.held()))

    @property
    def peak(self) -> int:
        """The most that any mark has seen."""
        return max((held for _, held in self.marks), default=0)

    def watch(self, model: torch.nn.Module | None = None, ledger=None) -> None:
        """Until the context ends, mark at each boundary of the modules and of the ledger's collectives.

        A module enters forward after its other hooks and leaves it before them; it enters backward when its
        output's gradient is there, and leaves it when its input's is.
        """
        for name, module in model.named_modules(prefix="model") if model is not None else ():
            enters = module.register_forward_pre_hook(self._boundary(name, "enters", "leaves"))
            leaves = module.register_forward_hook(self._boundary(name, "leaves", "enters"), prepend=True)
            self._undo.callback(enters.remove)
            self._undo.callback(leaves.remove)
        moments = {"start_record": "enter", "finish_record": "leave"}
        for method, moment in moments.items() if ledger is not None else ():
            marked = self._marked(getattr(ledger, method), moment)
            self._undo.enter_context(mock.patch.object(ledger, method, marked))

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {_key(x) for x in _tensors((args, kwargs))}
        out = op(*args, **(kwargs or {}))
        self._remember(x for x in _tensors(out) if _key(x) not in given)
        if self.operators:
            self.mark(op.overloadpacket.__name__)
        return out

    def _remember(self, tensors):
        for x in tensors:
            if x.device.type != "meta":
                self._alive[_key(x)] = x.untyped_storage()

    def _boundary(self, name, forward, backward):
        def hook(module, *tensors):
            self.mark(f"{name} {forward} forward")
            for x in _tensors(tensors[-1]):        # the input, or after forward the output
                if x.requires_grad:
                    comes = x.register_hook(lambda gradient: self.mark(f"{name} {backward} backward"))
                    self._undo.callback(comes.remove)
        return hook

    def _marked(self, call, moment):
        def marked(*args, **kwargs):
            row = call(*args, **kwargs) or args[0]             # start makes the record that finish is given
            self.mark(f"{row.op} {row.tag} {moment}s")
            return row
        return marked


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _key(x):
    return x.untyped_storage()._cdata
