"""ZeRO: every parameter is sharded along dim 0 over the data axis; the stage says what is still kept whole.

    stage 1  shards the optimizer state     elements on the wire a step, of a micro-batches: 2 Psi
    stage 2  and the gradients              (a + 1) Psi: reduce-scattered as soon as a bucket is full
    stage 3  and the parameters             3 a Psi: all-gathered unit by unit, forward and backward
AdamW in mixed precision holds (2+g) Psi + 12 Psi/N, 2 Psi + (12+g) Psi/N, (12+g) Psi/N bytes, g a gradient's.
Rajbhandari et al. 2020; stage 3 by units: FSDP, Zhao et al. 2023. Composes with any schedule and recompute.
"""
from collections.abc import Callable, Collection, Iterator
from functools import partial
from math import ceil, prod

import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import MeshAxis
from nanoinfra.distributed.reduce_scatter_gradients import (
    DEFAULT_BUCKET_BYTES,
    BucketedParam,
    GradientReducer,
    buffers_of_parameters,
    group_by_dtype_and_bytes,
    select_parameters,
)


class ZeroDataParallel:
    """`model`, sharded over `axis` in place, for a loss that is divided by the *global* token count.

    `param_names` (None: all) are the parameters that this is for; others are left as they are. ValueError for
    a name that no parameter has, and for a parameter that is in another group already.
    `param_shards[name]` (c, ...) are the rows of a trainable parameter that this rank's optimizer updates, in
    float32 or wider: rows [start, stop) = `row_ranges[name]` of `full_shapes[name]`, then zeros. The model
    computes in `dtype` (default: its own); gradients are summed in `grad_dtype` (default: the same).
    `fsdp_units` are lists of modules that run one after another and are unsharded together (stage 3; default:
    each child, a container's children one by one); modules in no unit stay whole. `read_param(name)` gives
    the first weights where `model` is on the meta device; rank 0's weights are broadcast. Gradient buckets
    hold at most two times `bucket_bytes` (stage 3: the largest unit's), or two times the largest parameter's.
    """

    def __init__(self, model: nn.Module, axis: MeshAxis, stage: int,
                 fsdp_units: list[list[nn.Module]] | None = None, dtype: torch.dtype | None = None,
                 grad_dtype: torch.dtype | None = None, bucket_bytes: int = DEFAULT_BUCKET_BYTES,
                 read_param: Callable[[str], torch.Tensor] | None = None,
                 param_names: Collection[str] | None = None):
        if stage not in (1, 2, 3):
            raise ValueError(f"ZeRO has stages 1, 2 and 3, not {stage}; stage 0 is parallel/data_parallel.py")
        self.axis, self.stage = axis, stage
        units = [] if stage < 3 else default_fsdp_units(model) if fsdp_units is None else fsdp_units
        selected = select_parameters(model, param_names)
        self.sharded_params = _shard_params(model, selected, axis, units, dtype, read_param)
        trained = [each for each in self.sharded_params if each.param.requires_grad]
        self.param_shards = {each.name: each.shard for each in trained}
        self.frozen_params = {each.name: each.shard for each in self.sharded_params
                              if not each.param.requires_grad}
        self.row_ranges = {each.name: each.row_range for each in self.sharded_params}
        self.full_shapes = {each.name: each.param.shape for each in trained}
        self.param_groups = [FSDPParamGroup(modules, params, axis) for i, modules in enumerate(units)
                             if (params := [each for each in self.sharded_params if each.unit_index == i])]
        if self.param_groups:
            bucket_bytes = max(group.gradient_bytes(grad_dtype) for group in self.param_groups)
        bucketed = [BucketedParam(each.param, each.name, each.shard.shape) for each in trained[::-1]]
        self.reducer = GradientReducer(bucketed, axis, bucket_bytes, grad_dtype)
        self._unsharded_group = self._prefetched_group = None
        self._in_backward = False
        self._register_hooks()
        whole = {id(each.unsharded): each for each in self.sharded_params if each.unit_index is None}.values()
        whole_trained = [each for each in whole if each.param.requires_grad]
        whole_frozen = [each for each in whole if each not in whole_trained]
        self._trained_buckets = self._gather_buckets(whole_trained, bucket_bytes)
        self._frozen_buckets = self._gather_buckets(whole_frozen, bucket_bytes)
        self.all_gather_params(include_frozen=True)

    def zero_grad(self) -> None:
        """Drop the last step's gradients."""
        self.reducer.zero_grad()

    def prepare_for_backward(self, is_last: bool) -> None:
        """Call before each backward. Stage 1 reduce-scatters gradients only in the last one of the step."""
        self.reducer.prepare_for_backward(sync_gradients=is_last or self.stage > 1)
        for group in self.param_groups:                                  # frozen parameters get no gradient
            group.params_awaiting_grad = {each.param for each in group.sharded_params}

    def finish_grad_sync(self) -> dict[str, torch.Tensor]:
        """Finish all reduce-scatters: {name: this rank's rows (c, ...) of the summed gradient}."""
        self._reshard()
        return self.reducer.finish_grad_sync()

    @property
    def names_without_grad(self) -> set[str]:
        """The trained parameters that no backward since `zero_grad` has given a gradient on this rank."""
        return self.reducer.names_without_grad

    def all_gather_params(self, include_frozen: bool = False) -> None:
        """After the optimizer's step: all-gather the parameters that stay whole on every rank.

        Those of an FSDP unit are gathered when the unit runs next. Frozen parameters are gathered only where
        `include_frozen`: at first, and after loading a checkpoint.
        """
        self._reshard()
        if self._prefetched_group:                                       # prefetched before the update
            self._prefetched_group.discard_all_gather()
            self._prefetched_group = None
        buckets = [*self._trained_buckets, *(self._frozen_buckets if include_frozen else ())]
        for i, bucket in enumerate(buckets):
            for each in buckets[i:i + 2]:                                # two all-gathers in flight
                each.start_all_gather()
            bucket.wait_all_gather()

    def persistent_tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that are kept between steps; several may share a storage."""
        yield from self.reducer.grads.values()
        for each in self.sharded_params:
            yield from (each.unsharded, each.shard)

    def _gather_buckets(self, params, bucket_bytes):
        groups = group_by_dtype_and_bytes(params, ShardedParam.dtype_and_numel, bucket_bytes)
        return [AllGatherBucket(group, self.axis) for group in groups]

    def _register_hooks(self):
        for param in self.reducer.bucket_of_param:
            param.register_post_accumulate_grad_hook(self._after_gradient)
        for group in self.param_groups:
            for module in group.modules:
                module.register_forward_pre_hook(partial(self._before_forward, group))
                module.register_forward_hook(partial(self._after_forward, group))

    def _before_forward(self, group, *_):
        self._unshard(group, in_backward=False)

    def _after_forward(self, group, module, _, output):
        """Reshard after forward; unshard again when a gradient arrives at the module's output."""
        for y in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(y, torch.Tensor) and y.requires_grad:
                y.register_hook(lambda _: self._unshard(group, in_backward=True))
        if module is group.modules[-1] and not self._in_backward:
            self._reshard()

    def _after_gradient(self, param):
        self.reducer.move_grad_to_bucket(param)
        group = self._unsharded_group
        if group and param in group.params_awaiting_grad:
            group.params_awaiting_grad.discard(param)
            if not group.params_awaiting_grad:
                self._reshard()

    def _unshard(self, group, in_backward):
        """Make only `group` whole, and prefetch the group that runs after it."""
        if group is self._unsharded_group:
            return
        self._reshard()
        if self._prefetched_group is not group:
            if self._prefetched_group:
                self._prefetched_group.discard_all_gather()              # the modules ran in another order
            group.start_all_gather()
        group.wait_all_gather()
        after = self.param_groups.index(group) + (-1 if in_backward else 1)
        self._unsharded_group, self._in_backward = group, in_backward
        self._prefetched_group = self.param_groups[after] if 0 <= after < len(self.param_groups) else None
        if self._prefetched_group:
            self._prefetched_group.start_all_gather()

    def _reshard(self):
        if self._unsharded_group:
            self._unsharded_group.reshard()
        self._unsharded_group = None


def default_fsdp_units(model: nn.Module) -> list[list[nn.Module]]:
    """A unit for each child of `model`; the children of a ModuleList or Sequential are units one by one."""
    found = []
    for child in model.children():
        is_container = isinstance(child, (nn.ModuleList, nn.Sequential))
        found += [[each] for each in child] if is_container else [[child]]
    return list({id(unit[0]): unit for unit in found}.values())


def _shard_params(model, selected, axis, units, dtype, read_param):
    """A ShardedParam for each place where a module holds a selected parameter; its `param` is put there."""
    unit_of = {module: i for i, unit in enumerate(units) for top in unit for module in top.modules()}
    if len(unit_of) < sum(len({module for top in unit for module in top.modules()}) for unit in units):
        raise ValueError("a module is in two units of ZeRO-3, and each frees it for the other; make them one")
    names = {p: name for name, p in selected.items()}
    for buffer in buffers_of_parameters(model, selected):
        comm.broadcast(buffer, axis, "weights")
    first, sharded_params = {}, []
    for module in model.modules():
        for key, p in module._parameters.items():
            if p not in names:                                           # None, or of another group
                continue
            name = names[p]
            if name not in first:
                tensor = (read_param(name) if read_param else p.detach()).contiguous()
                comm.broadcast(tensor, axis, "weights")
            sharded = ShardedParam(name, p, axis, dtype or p.dtype, unit_of.get(module), first.get(name),
                                   tensor.device)
            if name not in first:
                first[name] = sharded
                sharded.copy_shard_from(tensor)
            sharded.param.reduced_over = axis.name
            module._parameters[key] = sharded.param
            sharded_params.append(sharded)
    return sharded_params


class ShardedParam:
    """One use of one parameter: `unsharded` (N c, ...), its view `param`, and this rank's `shard` (c, ...).

    Rows past the parameter's own are zeros. A tied parameter has a ShardedParam for each use: a later use has
    the shard of the `first`, and its `unsharded` too where both stay whole. In float32 and wider, the shard
    of a parameter that stays whole is a view of it: it is its own master weight.
    """

    def __init__(self, name: str, param: nn.Parameter, axis: MeshAxis, dtype: torch.dtype,
                 unit_index: int | None, first: "ShardedParam | None", device: torch.device):
        n, r = axis.size, axis.rank
        d0, *rest = param.shape or (1,)
        c = ceil(d0 / n)
        self.name, self.unit_index = name, unit_index
        self.shard_numel = c * prod(rest)
        self.row_range = min(d0, r * c), min(d0, (r + 1) * c)
        if first and unit_index is None and first.unit_index is None:
            self.unsharded = first.unsharded
        else:
            self.unsharded = torch.empty(n * c, *rest, dtype=dtype, device=device)
        wide = torch.promote_types(dtype, torch.float32) if param.requires_grad else dtype
        if first:
            self.shard = first.shard
        elif unit_index is None and wide == dtype:
            self.shard = self.unsharded[r * c:(r + 1) * c]
        else:
            self.shard = torch.empty(c, *rest, dtype=wide, device=device)
        leaf = self.unsharded.data[:d0].view(param.shape)                # .data: a version count of its own
        self.param = nn.Parameter(leaf, requires_grad=param.requires_grad)

    def dtype_and_numel(self) -> tuple[torch.dtype, int]:
        """Dtype and elements of the unsharded parameter."""
        return self.unsharded.dtype, self.unsharded.numel()

    def copy_shard_from(self, full_tensor: torch.Tensor) -> None:
        """Copy this rank's rows of the whole parameter into `shard`."""
        start, stop = self.row_range
        self.shard.zero_()
        self.shard[:stop - start].copy_(full_tensor.view(-1, *self.shard.shape[1:])[start:stop])


class AllGatherBucket:
    """Sharded parameters of one dtype that one all-gather makes whole; row r of (N, S) is from rank r."""

    def __init__(self, sharded_params: list[ShardedParam], axis: MeshAxis):
        self.sharded_params, self.axis = sharded_params, axis
        self._async_all_gather = None
        self._shard_numels = [each.shard_numel for each in sharded_params]                    # S in all

    def start_all_gather(self) -> None:
        """Start to gather the shards, cast to the dtype that the model computes in."""
        if self._async_all_gather is None:
            first = self.sharded_params[0].unsharded
            buffer = first.new_empty(self.axis.size, sum(self._shard_numels))                 # (N, S)
            mine = buffer[self.axis.rank]
            torch._foreach_copy_(mine.split(self._shard_numels),
                                 [each.shard.view(-1) for each in self.sharded_params])
            self._async_all_gather = comm.all_gather(mine, self.axis, "weights", async_op=True, out=buffer)

    def wait_all_gather(self) -> None:
        """Wait for the all-gather and copy the rows into `unsharded`, which is allocated again if freed."""
        columns = self._async_all_gather.wait().split(self._shard_numels, dim=1)
        self._async_all_gather = None
        for each, rows in zip(self.sharded_params, columns):
            if each.unsharded.untyped_storage().nbytes() == 0:           # resharded
                each.unsharded.untyped_storage().resize_(each.unsharded.nbytes)
            each.unsharded.view(rows.shape).copy_(rows)                  # (N, c ...)


class FSDPParamGroup(AllGatherBucket):
    """An FSDP unit: modules whose parameters are unsharded together, and only while they are used."""

    def __init__(self, modules: list[nn.Module], sharded_params: list[ShardedParam], axis: MeshAxis):
        if len(dtypes := {each.unsharded.dtype for each in sharded_params}) > 1:
            raise ValueError(f"a unit is gathered in one dtype, and this has {sorted(map(str, dtypes))}; "
                             "give `dtype`, or make it two units")
        super().__init__(sharded_params, axis)
        self.modules, self.params_awaiting_grad = modules, set()
        self.reshard()

    def discard_all_gather(self) -> None:
        """Wait for the all-gather that was started, and drop its result."""
        self._async_all_gather.wait()
        self._async_all_gather = None

    def gradient_bytes(self, grad_dtype: torch.dtype | None) -> int:
        """Bytes of the unit's gradients, whole, in `grad_dtype` (default: the parameters' dtype)."""
        return sum(each.unsharded.numel() * (grad_dtype or each.unsharded.dtype).itemsize
                   for each in self.sharded_params)

    def reshard(self) -> None:
        """Free the unsharded parameters; the shards stay."""
        for each in self.sharded_params:
            each.unsharded.untyped_storage().resize_(0)
