"""The decoder under tensor and sequence parallelism: what a rank holds of it, what is summed once a step.

Column- and row-parallel linears, vocabulary-parallel embedding and head take the place of the plain ones;
formulas/tensor_parallel.py says which box of each parameter a rank has. Most gradients are whole then. Parts
of a sum are those of k and v where neighbours share a KV head; of q's and k's norms, which see this rank's
heads; and, under sequence parallelism, of what sees this rank's tokens: norms, positions, row-parallel
biases. Shoeybi et al. 2019; Korthikanti et al. 2022. Comes before recompute, ZeRO and data parallelism.
"""
from collections.abc import Callable, Iterator

import torch
from torch import nn

from nanoinfra.distributed import comm
from nanoinfra.formulas.tensor_parallel import boxes, check_heads, copies, cut_dim, partial
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.fill_model import Read
from nanoinfra.parallel.sequence_parallel import SP, Cut, CutPositions
from nanoinfra.parallel.tensor_parallel import RowLinear, Whole
from nanoinfra.parallel.vocab_parallel import VocabEmbedding, VocabHead


class TensorParallel:
    """`model`, cut over `mesh.tp` in place, whether it has its weights yet or is on the meta device.

    `boxes[name]` is the part of the logical parameter that this rank holds. `sp` is of sequence.SP: "none",
    "keep" what was gathered for backward, "gather" it again. Raises ValueError where the ranks cannot share
    the heads. Rank 0's weights count.
    """

    def __init__(self, model: Decoder, mesh, sp: str = "none"):
        if sp not in SP:
            raise ValueError(f"sequence parallelism is one of {', '.join(SP)}, not {sp!r}")
        config, self.axis = model.config, mesh.tp
        check_heads(config, self.axis.size)
        self.boxes = boxes(config, self.axis.size, self.axis.rank)
        self.sharing = mesh.inner("tp", copies(config, self.axis.size))
        self.region = Whole(self.axis) if sp == "none" else Cut(self.axis, sp == "keep")
        exchange(model, self._mine)
        self._divide_ends(model, self.boxes["embed.weight"][0][0])
        for block in model.blocks:
            self._divide(block)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parts = [name for name in trained if partial(name, sp)]
        self.shared = [name for name in trained if self.sharing.size > 1 and _module(name) in ("k", "v")]

    def part(self, read: Read, name: str, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """This rank's part of parameter `name`, read by itself."""
        box = tuple(slice(*ends) for ends in self.boxes[name])
        return read(name, box).to(device, dtype, copy=True).contiguous()     # a file is only mapped

    def finish(self, grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sum over the axis, in place, the gradients of which this rank has a part: two calls at most."""
        _sum([grads[name] for name in self.parts], self.axis)
        _sum([grads[name] for name in self.shared], self.sharing)
        return grads

    def counts(self, name: str) -> bool:
        """Of the ranks that hold the same part of parameter `name`: does a sum over the axis take mine?"""
        if _module(name) in ("k", "v"):
            return self.sharing.rank == 0
        return cut_dim(name) is not None or self.axis.rank == 0

    def _divide_ends(self, model, start):
        """Those that are there: of a pipeline's chunk perhaps none."""
        one = model.embed is model.head                                      # a tied head under its own name
        if model.embed is not None and not one:
            model.embed = VocabEmbedding(model.embed, start, self.region)
        if model.head is not None:
            model.head = VocabHead(model.head, start, model.config.vocab, self.region)
        if one:
            model.embed = model.head
        if isinstance(self.region, Cut) and getattr(model, "positions", None) is not None:
            model.positions = CutPositions(model.positions, self.region)

    def _divide(self, block):
        attn, mlp, heads = block.attn, block.mlp, block.attn.o.weight.shape[1] // block.attn.head_dim
        attn.read = mlp.read = self.region.read
        attn.o, mlp.down = RowLinear(attn.o, self.region), RowLinear(mlp.down, self.region)
        if slopes := attn.mask.slopes:                                       # ALiBi's, one a query head
            attn.mask = attn.mask._replace(slopes=slopes[self.axis.rank * heads:][:heads])

    def _mine(self, name, p):
        if not p.is_meta:
            comm.broadcast(p.data, self.axis, "weights")
        mine = p.detach()[tuple(slice(*ends) for ends in self.boxes[name])].clone()
        return nn.Parameter(mine, p.requires_grad)


def exchange(model: nn.Module, new: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Put `new(name, parameter)` in the place of each parameter; a tied one stays tied."""
    names, made = {p: name for name, p in model.named_parameters()}, {}
    for module, key, p in list(places(model)):
        if p not in made:
            made[p] = new(names[p], p)
        module._parameters[key] = made[p]


def places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, its name for it, parameter) wherever a module holds one."""
    for module in model.modules():
        yield from ((module, key, p) for key, p in module._parameters.items() if p is not None)


def _module(name):
    """The module that a parameter belongs to: `o` of blocks.3.attn.o.weight."""
    return name.split(".")[-2]


def _sum(tensors, axis):
    """All of them in one all-reduce, in place."""
    if tensors and axis.size > 1:
        flat = comm.all_reduce(torch.cat([x.reshape(-1) for x in tensors]), axis, "tp grads")
        torch._foreach_copy_(tensors, [part.view_as(x) for part, x in
                                       zip(flat.split([x.numel() for x in tensors]), tensors)])
