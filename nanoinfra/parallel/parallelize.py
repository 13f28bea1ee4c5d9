"""Apply all parallelism techniques (3D parallelism and ZeRO) to a plain model, in one fixed order.

1. The pipeline splits the layers into chunks: everything after it sees a shorter model.
2. Tensor and sequence parallelism shard the parameters: from here on they are smaller.
3. Recompute (activation checkpointing) wraps what a block runs, its collectives included.
4. Weights are filled in: each rank reads, or draws, only its own shards.
5. ZeRO or data parallelism shards or synchronises what is there by then, over the ranks that hold the same.
Combinations that do not exist are refused before (refusals/). Techniques share nothing but the mesh.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh, MeshAxis
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.memory.recompute import apply_activation_checkpointing
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.ports import check_ports
from nanoinfra.model.weights.read_weights_into_decoder import ReadParameter, decoder_on_meta_device
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.pipeline.stage import cut_to_pipeline_chunk
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel, replace_parameters
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.parallel.zero import ZeroDataParallel

_TIED_PARAM = "embed.weight"                 # also the head's weight, where the two are tied


@dataclass(frozen=True)
class ParallelConfig:
    """What to apply besides the mesh."""
    sequence_parallel: str = "none"          # one of SEQUENCE_PARALLEL_MODES
    zero_stage: int = 0                      # 0 is plain data parallelism
    recompute: str = "none"                  # one of RECOMPUTE_MODES
    grad_sync: str = "overlap"               # one of GRAD_SYNC_MODES, for ZeRO stage 0
    dtype: torch.dtype = torch.float32       # of the weights that the model computes with
    grad_dtype: torch.dtype | None = None    # in which gradients are summed; None: the same
    virtual_stages: int = 1                  # chunks of the model on each pipeline stage
    attention: str = "sdpa"
    frozen_names: frozenset[str] = frozenset()           # of parameters that are not trained


class ParallelChunk:
    """One chunk of the model on this rank, with all parallelism applied; the whole model without a pipeline.

    `model` comes without storage. `read(name, part)` gives the first weights. `loss_head` ends the chunk that
    has the head; it gives -log p of each target. The optimizer updates `master_weights` {name: float32
    tensor} or, where that is None, the `param_shards`; nothing updates the `frozen_params`.
    """

    def __init__(self, model: Decoder, mesh: Mesh, config: ParallelConfig, read: ReadParameter):
        self.model, self.zero_stage = model, config.zero_stage
        for name in config.frozen_names & dict(model.named_parameters()).keys():
            model.get_parameter(name).requires_grad_(False)
        self.tensor_parallel = TensorParallel(model, mesh, config.sequence_parallel)
        self.loss_head = VocabParallelCrossEntropy(model.head) if model.head else None
        self.master_weights = None
        apply_activation_checkpointing(model, config.recompute)

        def read_param(name):
            return self.tensor_parallel.read_shard(read, name, mesh.device)
        if config.zero_stage:
            units = fsdp_units(model, self.loss_head) if config.zero_stage == 3 else None
            self.data_parallel = ZeroDataParallel(model, mesh.data, config.zero_stage, units, config.dtype,
                                                  config.grad_dtype, read_param=read_param)
        else:
            self._load_weights(read_param, config.dtype)
            self.data_parallel = DataParallel(model, mesh.data, config.grad_sync,
                                              grad_dtype=config.grad_dtype)
        self.param_shards = self.data_parallel.param_shards
        self.frozen_params = self.data_parallel.frozen_params
        check_ports(model)

    def _load_weights(self, read_param, dtype):
        """Whole weights in `dtype`; below float32 the weights as they were read become the master weights."""
        replace_parameters(self.model, lambda name, p: nn.Parameter(read_param(name), p.requires_grad))
        if dtype.itemsize < 4:
            self.master_weights = {name: p.detach() for name, p in self.model.named_parameters()
                                   if p.requires_grad}
        replace_parameters(self.model, lambda name, p: nn.Parameter(p.detach().to(dtype), p.requires_grad))

    def embed_batch(self, batch: Batch) -> torch.Tensor:
        """The input of the model's first chunk: the embedded tokens of `batch`, (B, T, C)."""
        return self.model.embed_tokens(batch.tokens, self._positions(batch))

    def forward_chunk(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The layers' output for hidden states `x` of `batch`; on the last chunk -log p by target, (B, T)."""
        self.tensor_parallel.region.set_seq_len(batch.tokens.shape[1])
        x = self.model.blocks_and_norm(x, self._positions(batch), document_ends=batch.document_ends)
        return self.loss_head(x, batch.targets) if self.loss_head else x

    def finish_grad_sync(self) -> dict[str, torch.Tensor]:
        """Wait until gradients are summed over the data axis and over tensor-parallel ranks: {name: grad}."""
        return self.tensor_parallel.all_reduce_partial_grads(self.data_parallel.finish_grad_sync())

    def optimizer_shard(self, param_name: str) -> TensorShard:
        """The part of the logical parameter that this rank's optimizer holds."""
        shard = self.tensor_parallel.parameter_shards[param_name]
        if not self.zero_stage or not shard.size:
            return shard
        return shard.slice_dim(0, *self.data_parallel.row_ranges[param_name])

    def _positions(self, batch):
        return self.model.default_positions(batch.tokens) if batch.positions is None else batch.positions


class ParallelModel:
    """All of the model that one rank trains: its pipeline stage's chunks, with all parallelism applied."""

    def __init__(self, model_config: ModelConfig, mesh: Mesh, config: ParallelConfig, read: ReadParameter):
        self.mesh, self.config = mesh, config
        p, n = mesh.pp.size, mesh.pp.size * config.virtual_stages
        layers = split_layers_into_chunks(model_config, n, model_config.context)
        models = [cut_to_pipeline_chunk(decoder_on_meta_device(model_config, config.attention).train(),
                                        *layers[i],
                                        is_last_chunk=i == n - 1) for i in range(mesh.pp.rank, n, p)]
        self.chunks = [ParallelChunk(model, mesh, config, read) for model in models]
        is_tied = model_config.tied and p > 1
        self.tied_axis = mesh.first_last_subgroup("pp") if is_tied else None     # that have the weight
        self.param_shards = self._of_all_chunks("param_shards")
        has_masters = bool(self.chunks[0].master_weights)
        self.master_weights = self._of_all_chunks("master_weights") if has_masters else None
        self.frozen_params = self._of_all_chunks("frozen_params")

    def zero_grad(self) -> None:
        """Drop the last step's gradients."""
        for chunk in self.chunks:
            chunk.data_parallel.zero_grad()

    def finish_grad_sync(self) -> dict[str, torch.Tensor]:
        """Wait for all sums: {name: summed gradient, with ZeRO this rank's rows of it}.

        The gradient of a tied weight is also summed over first and last pipeline stage.
        """
        grads = {name: grad for chunk in self.chunks for name, grad in chunk.finish_grad_sync().items()}
        if self.tied_axis and _TIED_PARAM in grads:
            comm.all_reduce(grads[_TIED_PARAM], self.tied_axis, "tied")
        return grads

    def names_without_grad(self) -> list[str]:
        """The trained parameters of this rank that no backward of the step has given a gradient."""
        return sorted(set().union(*(chunk.data_parallel.names_without_grad for chunk in self.chunks)))

    def all_gather_params(self, include_frozen: bool = False) -> None:
        """After the optimizer's step: gather the updated shards. After loading: frozen parameters too."""
        for chunk in self.chunks:
            chunk.data_parallel.all_gather_params(include_frozen)

    def grad_norm_axes(self) -> list[MeshAxis]:
        """The axes whose ranks hold different gradients: squared norms are summed over these."""
        return [self.mesh.tp, self.mesh.pp, *([self.mesh.data] if self.config.zero_stage else [])]

    def counted_in_norm(self, param_name: str) -> bool:
        """Whether this rank's gradient counts in the norm: of ranks that hold the same shard, one does."""
        is_second_copy = self.tied_axis and param_name == _TIED_PARAM and self.tied_axis.rank > 0
        return not is_second_copy and self.chunks[0].tensor_parallel.counted_in_norm(param_name)

    def optimizer_shard(self, param_name: str) -> TensorShard:
        """The part of the logical parameter that this rank's optimizer holds."""
        for chunk in self.chunks:
            if param_name in chunk.param_shards | chunk.frozen_params:
                return chunk.optimizer_shard(param_name)
        raise KeyError(param_name)

    def persistent_tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that are kept between steps."""
        for chunk in self.chunks:
            yield from chunk.data_parallel.persistent_tensors()

    def _of_all_chunks(self, attribute):
        return {name: tensor for chunk in self.chunks for name, tensor in getattr(chunk, attribute).items()}


def parallelize_for_serving(model: Decoder, mesh: Mesh, read: ReadParameter, dtype: torch.dtype) -> Decoder:
    """Shard `model`, which comes without storage, over `mesh.tp` and read its weights, for generation."""
    tp = TensorParallel(model, mesh)

    def make_parameter(name, _):
        return nn.Parameter(tp.read_shard(read, name, mesh.device, dtype), requires_grad=False)
    replace_parameters(model, make_parameter)
    check_ports(model)
    return model


def fsdp_units(model: nn.Module, loss_head: nn.Module) -> list[list[nn.Module]]:
    """The modules that ZeRO-3 gathers together: embeddings; each block; final norm with head and loss."""
    embedding_names = ("embed", "positions", "embed_norm")
    embeddings = [module for name, module in model.named_children() if name in embedding_names]
    return [embeddings, *([block] for block in model.blocks), [model.norm, loss_head]]
