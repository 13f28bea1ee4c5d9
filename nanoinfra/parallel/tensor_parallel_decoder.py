"""Tensor and sequence parallelism applied to the decoder: what each rank holds, which gradients are summed.

A linear keeps its shard (formulas/tensor_parallel.py says which), and column- or row-parallel ports apply it;
vocabulary-parallel embedding and head replace the plain ones. Most gradients are complete on each rank.
Partial ones, which are all-reduced once a step, are those of k and v where ranks share a KV head, of q's and
k's norms, which see only this rank's heads, and, under sequence parallelism, of what sees only this rank's
tokens: norms, position embeddings, row-parallel biases. Shoeybi et al. 2019; Korthikanti et al. 2022.
"""
from collections.abc import Callable

import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.tensor_parallel import (
    SEQUENCE_PARALLEL_MODES,
    check_tp_fits_model,
    has_partial_grad,
    kv_head_replicas,
    tp_sharded_dim,
    tp_shards,
)
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.ports import LinearPort, check_bare_linears, replace_ports, why_not_bare
from nanoinfra.model.weights.read_weights_into_decoder import ReadParameter
from nanoinfra.parallel.sequence_parallel import SequenceParallelPositionEmbedding, SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import (
    TensorParallelRegion,
    column_parallel_linear,
    row_parallel_linear,
)
from nanoinfra.parallel.vocab_parallel import ParallelLMHead, VocabParallelEmbedding


class TensorParallel:
    """Shards `model` over `mesh.tp` in place, whether it has its weights yet or is on the meta device.

    `parameter_shards[name]` is the part of the logical parameter that this rank holds.
    `sequence_parallel` is one of SEQUENCE_PARALLEL_MODES: "none", or whether backward "keep"s the gathered
    input or "gather"s it again. Raises ValueError where the ranks cannot share the heads, TypeError where a
    linear is wrapped or has adapters, which come later. Rank 0's weights are broadcast.
    """

    def __init__(self, model: Decoder, mesh: Mesh, sequence_parallel: str = "none"):
        sp = sequence_parallel
        if sp not in SEQUENCE_PARALLEL_MODES:
            raise ValueError(f"sequence parallelism is one of {', '.join(SEQUENCE_PARALLEL_MODES)}, "
                             f"not {sp!r}")
        config, self.axis = model.config, mesh.tp
        check_tp_fits_model(config, self.axis.size)
        check_bare_linears(model, "tensor parallelism")
        self.parameter_shards = tp_shards(config, self.axis.size, self.axis.rank)
        _, self.kv_replica_axis = mesh.split("tp", kv_head_replicas(config, self.axis.size))
        if sp == "none":
            self.region = TensorParallelRegion(self.axis)
        else:
            self.region = SequenceParallelRegion(self.axis, save_gathered=sp == "keep")
        replace_ports(model, lambda *linears: ColumnParallelPort(self.region),
                      lambda linear: RowParallelPort(self.region))
        replace_parameters(model, self._shard_of)
        self._replace_embedding_and_head(model, self.parameter_shards["embed.weight"].offset[0])
        for block in model.blocks:
            self._shard_alibi_slopes(block.attn)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self._partial_grad_names = [name for name in trained if has_partial_grad(name, sp)]
        self._replicated_kv_names = [name for name in trained if self.kv_replica_axis.size > 1
                                     and _module_name(name) in ("k", "v")]

    def read_shard(self, read: ReadParameter, param_name: str, device: str,
                   dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Read only this rank's shard of a parameter, onto `device`."""
        slices = self.parameter_shards[param_name].slices_within()
        return read(param_name, slices).to(device, dtype, copy=True).contiguous()    # a file is memory-mapped

    def all_reduce_partial_grads(self, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum partial gradients over the ranks that have the other parts, in place, in at most two calls."""
        _all_reduce_together([grads[name] for name in self._partial_grad_names], self.axis)
        _all_reduce_together([grads[name] for name in self._replicated_kv_names], self.kv_replica_axis)
        return grads

    def counted_in_norm(self, param_name: str) -> bool:
        """Whether this rank's gradient counts in the norm: of ranks that hold the same shard, one does."""
        if _module_name(param_name) in ("k", "v"):
            return self.kv_replica_axis.rank == 0
        return tp_sharded_dim(param_name) is not None or self.axis.rank == 0

    def _replace_embedding_and_head(self, model, vocab_start):
        """A pipeline chunk may have only one of them, or neither."""
        is_alias = model.embed is model.head                     # a tied head under the embedding's name
        if model.embed is not None and not is_alias:
            model.embed = VocabParallelEmbedding(model.embed, vocab_start, self.region)
        if model.head is not None:
            model.head = ParallelLMHead(model.head, vocab_start, model.config.vocab, self.region)
        if is_alias:
            model.embed = model.head
        if isinstance(self.region, SequenceParallelRegion) and getattr(model, "positions", None) is not None:
            model.positions = SequenceParallelPositionEmbedding(model.positions, self.region)

    def _shard_alibi_slopes(self, attn):
        heads = attn.o.weight.shape[1] // attn.head_dim
        if slopes := attn.mask.alibi_slopes:                           # ALiBi's, one a query head
            attn.mask = attn.mask._replace(alibi_slopes=slopes[self.axis.rank * heads:][:heads])

    def _shard_of(self, name, p):
        if not p.is_meta:
            comm.broadcast(p.data, self.axis, "weights")
        shard = self.parameter_shards[name]
        return nn.Parameter(p.detach()[shard.slices_within()].clone(), p.requires_grad)


class ColumnParallelPort(LinearPort):
    """The in-port of tensor parallelism: this rank's outputs (B, T, D/t), by `column_parallel_linear`."""

    def __init__(self, region: TensorParallelRegion):
        self.region = region
        self.is_plain = region.axis.size == 1

    def __call__(self, x: torch.Tensor, *linears: nn.Linear) -> list[torch.Tensor]:
        _check_types(self, linears)
        return column_parallel_linear(self.region, x, *linears)

    def why_not_taken(self, linear: nn.Module) -> str:
        """Why this port, which reads the linears' weights, must not be given `linear`."""
        return why_not_bare(linear, "the column-parallel port")


class RowParallelPort(LinearPort):
    """The out-port of tensor parallelism: the sum of the ranks' outputs, by `row_parallel_linear`."""

    def __init__(self, region: TensorParallelRegion):
        self.region = region
        self.is_plain = region.axis.size == 1

    def __call__(self, y: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        _check_types(self, (linear,))
        return row_parallel_linear(self.region, y, linear)

    def why_not_taken(self, linear: nn.Module) -> str:
        """Why this port, which reads the linear's weight, must not be given `linear`."""
        return why_not_bare(linear, "the row-parallel port")


def replace_parameters(model: nn.Module, make_parameter: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter by `make_parameter(name, old_parameter)`; tied parameters stay tied."""
    names, made = {p: name for name, p in model.named_parameters()}, {}
    for module, key, p in list(_parameter_places(model)):
        if p not in made:
            made[p] = make_parameter(names[p], p)
        module._parameters[key] = made[p]


def _parameter_places(model):
    """(module, its name for it, parameter) wherever a module holds a parameter."""
    for module in model.modules():
        yield from ((module, key, p) for key, p in module._parameters.items() if p is not None)


def _check_types(port, linears):
    """What is wrapped after `check_ports`, or inside of an adapter, is refused when it is called."""
    for linear in linears:
        if type(linear) is not nn.Linear:
            raise TypeError(port.why_not_taken(linear))


def _module_name(param_name):
    """The module that a parameter belongs to: `o` of blocks.3.attn.o.weight."""
    return param_name.split(".")[-2]


def _all_reduce_together(tensors, axis):
    """Sum all tensors over the axis in one all-reduce, in place."""
    if tensors and axis.size > 1:
        flat = comm.all_reduce(torch.cat([x.reshape(-1) for x in tensors]), axis, "tp grads")
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in
                                       zip(flat.split([x.numel() for x in tensors]), tensors)])
