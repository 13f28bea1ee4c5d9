"""Count the bytes of all live tensors: each storage that this thread made and that is still alive, once.

    with LiveTensorBytes(initial_tensors=model.parameters()) as storages:
        storages.mark_module_boundaries(model, mesh.comm_log)
        step()
    storages.peak_bytes

Tensors that autograd saved and buffers of running collectives count, a kernel's scratch memory does not.
"""
from collections.abc import Iterable
from contextlib import ExitStack
from unittest import mock
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """A context that keeps a weak reference to the storage of every operator's results.

    Storages made before count only if `initial_tensors` has a tensor of theirs. Meta tensors and memory of
    numpy never count. With `mark_operators` each operator records a mark, which is slow. gloo may hold the
    buffers of a collective for a moment after it is done, and then they count.
    """

    def __init__(self, initial_tensors: Iterable[torch.Tensor] = (), mark_operators: bool = False):
        super().__init__()
        self._mark_operators = mark_operators
        self.marks: list[tuple[str, int]] = []     # (label, live bytes then)
        self._alive, self._undo = WeakValueDictionary(), ExitStack()
        self._remember(initial_tensors)

    def live_bytes(self) -> int:
        """Bytes of all storages that are alive now."""
        return sum(storage.nbytes() for storage in self._alive.values())

    def record_mark(self, label: str) -> None:
        """Append (label, live bytes) to `marks`."""
        self.marks.append((label, self.live_bytes()))

    @property
    def peak_bytes(self) -> int:
        """The largest number of live bytes at any mark."""
        return max((held for _, held in self.marks), default=0)

    def mark_module_boundaries(self, model: torch.nn.Module | None = None, comm_log=None) -> None:
        """Record marks around each module's forward and backward, and each collective of `comm_log`.

        A module's forward begins after its other hooks and ends before them. Its backward begins when the
        gradient of its output is there, and ends when that of its input is. Marks end with the context.
        """
        for name, module in model.named_modules(prefix="model") if model is not None else ():
            enters = module.register_forward_pre_hook(self._boundary(name, "enters", "leaves"))
            leaves = module.register_forward_hook(self._boundary(name, "leaves", "enters"), prepend=True)
            self._undo.callback(enters.remove)
            self._undo.callback(leaves.remove)
        moments = {"start_record": "enter", "finish_record": "leave"}
        for method, moment in moments.items() if comm_log is not None else ():
            marked = self._marked(getattr(comm_log, method), moment)
            self._undo.enter_context(mock.patch.object(comm_log, method, marked))

    def __exit__(self, *error):
        self._undo.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {_key(x) for x in _tensors((args, kwargs))}
        out = op(*args, **(kwargs or {}))
        self._remember(x for x in _tensors(out) if _key(x) not in given)
        if self._mark_operators:
            self.record_mark(op.overloadpacket.__name__)
        return out

    def _remember(self, tensors):
        for x in tensors:
            if x.device.type != "meta":
                self._alive[_key(x)] = x.untyped_storage()

    def _boundary(self, name, forward, backward):
        def hook(module, *tensors):
            self.record_mark(f"{name} {forward} forward")
            for x in _tensors(tensors[-1]):        # the input, or after forward the output
                if x.requires_grad:
                    comes = x.register_hook(lambda gradient: self.record_mark(f"{name} {backward} backward"))
                    self._undo.callback(comes.remove)
        return hook

    def _marked(self, call, moment):
        def marked(*args, **kwargs):
            row = call(*args, **kwargs) or args[0]             # enter makes the row that leave is given
            self.record_mark(f"{row.op} {row.tag} {moment}s")
            return row
        return marked


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def _key(x):
    return x.untyped_storage()._cdata
