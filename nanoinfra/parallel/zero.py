"""ZeRO: every parameter is cut along dim 0 over the data axis; the stage only says what is still kept whole.

    stage 1  cuts the optimizer's state     elements on the wire a step, of a micro-batches: 2 Psi
    stage 2  and the gradients              (a + 1) Psi: they leave as soon as a bucket of them is full
    stage 3  and the parameters             3 a Psi: gathered unit by unit, forward and backward, then freed
AdamW in mixed precision holds (2+g) Psi + 12 Psi/N, 2 Psi + (12+g) Psi/N, (12+g) Psi/N bytes, g a gradient's.
Rajbhandari et al. 2020; stage 3 by units: FSDP, Zhao et al. 2023. Composes with any schedule and recompute.
"""
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil, prod

import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.reducer import Leaf, Reducer, pack

BUCKET_BYTES = 25 << 20


class Zero:
    """`model`, cut over `axis` in place, for a loss that is divided by the *global* token count.

    `shards[name]` (c, ...) are the rows of a trainable parameter that this rank's optimizer moves, in float32
    or wider: of `shapes[name]` the rows [start, stop) = `rows[name]`, then zeros. The model computes in
    `dtype` (default: its own); gradients are summed in `grad_dtype` (default: the same). `units` are lists
    of modules that run one after another and are whole together (stage 3; default: each child, a
    container's children one by one); what is in none stays whole. `source(name)` gives the first weights
    where `model` is on the meta device; rank 0's count. Gradients on their way hold at most two times
    `bucket_bytes` (stage 3: the largest unit's), or two times the largest parameter's.
    """

    def __init__(self, model: nn.Module, axis, stage: int, units: list[list[nn.Module]] | None = None,
                 dtype: torch.dtype | None = None, grad_dtype: torch.dtype | None = None,
                 bucket_bytes: int = BUCKET_BYTES, source: Callable[[str], torch.Tensor] | None = None):
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO has stages 1, 2 and 3, not {stage}; stage 0 is parallel/data_parallel.py")
        groups = [] if stage < 3 else children(model) if units is None else units
        self.axis, self.stage = axis, stage
        self.parts = cut(model, axis, groups, dtype, source)
        trained = [part for part in self.parts if part.param.requires_grad]
        self.shards = {part.name: part.shard for part in trained}
        self.frozen = {part.name: part.shard for part in self.parts if not part.param.requires_grad}
        self.rows = {part.name: part.rows for part in self.parts}
        self.shapes = {part.name: part.param.shape for part in trained}
        self.units = [Unit(group, parts, axis) for i, group in enumerate(groups)
                      if (parts := [part for part in self.parts if part.unit == i])]
        if self.units:
            bucket_bytes = max(unit.gradient_bytes(grad_dtype) for unit in self.units)
        leaves = [Leaf(part.param, part.name, part.shard.shape) for part in trained[::-1]]
        self.reducer = Reducer(leaves, axis, bucket_bytes, grad_dtype)
        self.here = self.coming = None                                   # the whole unit, and the next
        self.going_back = False
        self._hook()
        stay = {id(part.whole): part for part in self.parts if part.unit is None}.values()
        moves = [part for part in stay if part.param.requires_grad]
        self.resident = self._bundles(moves, bucket_bytes)
        self.still = self._bundles([part for part in stay if part not in moves], bucket_bytes)
        self.publish(frozen=True)

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        self.reducer.begin_step()

    def before_backward(self, last: bool) -> None:
        """Say before each backward whether it is the step's last: at stage 1 gradients leave only then."""
        self.reducer.before_backward(leaving=last or self.stage > 1)
        for unit in self.units:
            unit.waiting = {part.param for part in unit.parts}           # frozen ones never come

    def finish(self) -> dict[str, torch.Tensor]:
        """Send what has not left, wait for everything: {name: this rank's rows (c, ...) of the sum}."""
        self._leave()
        return self.reducer.finish()

    def publish(self, frozen: bool = False) -> None:
        """After the optimizer's step: gather anew what is kept whole. A unit is when it is next entered.

        What is `frozen` is gathered only once, and when it has been loaded.
        """
        self._leave()
        if self.coming:                                                  # stale now
            self.coming = self.coming.drop()
        bundles = [*self.resident, *(self.still if frozen else ())]
        for i, bundle in enumerate(bundles):
            for near in bundles[i:i + 2]:                                # two on their way
                near.launch()
            bundle.land()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All it holds between steps; several may share a storage."""
        yield from self.reducer.grads.values()
        for part in self.parts:
            yield from (part.whole, part.shard)

    def _bundles(self, parts, bucket_bytes):
        return [Bundle(group, self.axis) for group in pack(parts, Part.measure, bucket_bytes)]

    def _hook(self):
        for param in self.reducer.home:
            param.register_post_accumulate_grad_hook(self._arrive)
        for unit in self.units:
            for module in unit.modules:
                module.register_forward_pre_hook(partial(self._before_forward, unit))
                module.register_forward_hook(partial(self._after_forward, unit))

    def _before_forward(self, unit, *_):
        self._enter(unit, back=False)

    def _after_forward(self, unit, module, _, output):
        """Free the unit; it is whole again when a gradient comes back to what it made."""
        for y in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(y, torch.Tensor) and y.requires_grad:
                y.register_hook(lambda _: self._enter(unit, back=True))
        if module is unit.modules[-1] and not self.going_back:
            self._leave()

    def _arrive(self, param):
        self.reducer.arrive(param)
        if self.here and param in self.here.waiting:
            self.here.waiting.discard(param)
            if not self.here.waiting:
                self._leave()

    def _enter(self, unit, back):
        """Make `unit` whole, alone, and send for the one that comes after it."""
        if unit is self.here:
            return
        self._leave()
        if self.coming is not unit:
            if self.coming:
                self.coming.drop()                                       # the modules went another way
            unit.launch()
        unit.land()
        after = self.units.index(unit) + (-1 if back else 1)
        self.here, self.going_back = unit, back
        self.coming = self.units[after] if 0 <= after < len(self.units) else None
        if self.coming:
            self.coming.launch()

    def _leave(self):
        if self.here:
            self.here.free()
        self.here = None


def children(model: nn.Module) -> list[list[nn.Module]]:
    """The units of a model that names none: its children, those of a container one by one."""
    found = []
    for child in model.children():
        inside = isinstance(child, (nn.ModuleList, nn.Sequential))
        found += [[each] for each in child] if inside else [[child]]
    return list({id(unit[0]): unit for unit in found}.values())


def cut(model, axis, groups, dtype, source):
    """A Part for each place where a module holds a parameter; from now on it holds the part's leaf there."""
    unit_of = {module: i for i, group in enumerate(groups) for top in group for module in top.modules()}
    if len(unit_of) < sum(len({module for top in group for module in top.modules()}) for group in groups):
        raise ValueError("a module is in two units of ZeRO-3, and each frees it for the other; make them one")
    names, first, parts = {p: name for name, p in model.named_parameters()}, {}, []
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is None:
                continue
            name = names[p]
            if name not in first:
                tensor = (source(name) if source else p.detach()).contiguous()
                comm.broadcast(tensor, axis, "weights")
            part = Part(name, p, axis, dtype or p.dtype, unit_of.get(module), first.get(name), tensor.device)
            if name not in first:
                first[name] = part
                part.fill(tensor)
            module._parameters[key] = part.param
            parts.append(part)
    for buffer in model.buffers():
        comm.broadcast(buffer, axis, "weights")
    return parts


class Part:
    """One use of one parameter: `param`, a leaf that views `whole` (N c, ...); `shard` (c, ...), my rows.

    Rows past the parameter's own are zeros. A later use has the shard of the `first`, and its whole
    where both stay. In float32 and wider, what stays whole is its own master.
    """

    def __init__(self, name, param, axis, dtype, unit, first, device):
        n, r = axis.size, axis.rank
        d0, *rest = param.shape or (1,)
        c = ceil(d0 / n)
        self.name, self.unit, self.numel = name, unit, c * prod(rest)
        self.rows = min(d0, r * c), min(d0, (r + 1) * c)
        if first and unit is None and first.unit is None:
            self.whole = first.whole
        else:
            self.whole = torch.empty(n * c, *rest, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32) if param.requires_grad else dtype
        if first:
            self.shard = first.shard
        elif unit is None and wide == dtype:
            self.shard = self.whole[r * c:(r + 1) * c]
        else:
            self.shard = torch.empty(c, *rest, dtype=wide, device=device)
        leaf = self.whole.data[:d0].view(param.shape)                    # .data: a version count of its own
        self.param = nn.Parameter(leaf, requires_grad=param.requires_grad)

    def measure(self):
        """What packing needs to know: (dtype, elements)."""
        return self.whole.dtype, self.whole.numel()

    def fill(self, tensor):
        """Take my rows of the whole `tensor`."""
        start, stop = self.rows
        self.shard.zero_()
        self.shard[:stop - start].copy_(tensor.view(-1, *self.shard.shape[1:])[start:stop])


class Bundle:
    """Parts of one dtype that one call gathers: rank r's shards are row r of (N, S)."""

    def __init__(self, parts, axis):
        self.parts, self.axis, self.pending = parts, axis, None
        self.sizes = [part.numel for part in parts]                      # S in all

    def launch(self):
        """Start to gather; shards are cast on the way."""
        if self.pending is None:
            buffer = self.parts[0].whole.new_empty(self.axis.size, sum(self.sizes))   # (N, S)
            mine = buffer[self.axis.rank]
            torch._foreach_copy_(mine.split(self.sizes), [part.shard.view(-1) for part in self.parts])
            self.pending = comm.all_gather(mine, self.axis, "weights", wait=False, out=buffer)

    def land(self):
        """Wait, and lay the rows of each part together."""
        columns, self.pending = self.pending.wait().split(self.sizes, dim=1), None
        for part, rows in zip(self.parts, columns):
            if part.whole.untyped_storage().nbytes() == 0:               # freed
                part.whole.untyped_storage().resize_(part.whole.nbytes)
            part.whole.view(rows.shape).copy_(rows)                      # (N, c ...)


class Unit(Bundle):
    """Modules whose parameters are whole together, and no longer than they are used."""

    def __init__(self, modules, parts, axis):
        if len(dtypes := {part.whole.dtype for part in parts}) > 1:
            raise ValueError(f"a unit is gathered in one dtype, and this has {sorted(map(str, dtypes))}; "
                             "give `dtype`, or make it two units")
        super().__init__(parts, axis)
        self.modules, self.waiting = modules, set()
        self.free()

    def drop(self):
        self.pending.wait()
        self.pending = None

    def gradient_bytes(self, dtype):
        return sum(part.whole.numel() * (dtype or part.whole.dtype).itemsize for part in self.parts)

    def free(self):
        for part in self.parts:
            part.whole.untyped_storage().resize_(0)
