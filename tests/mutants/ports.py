"""Known-wrong ports: wrapped linears read as bare ones, adapters that nobody applies, gradients never missed.

`refusal` says how the library refuses a technique that would switch itself off; a mutant is patched in.
"""
from dataclasses import replace

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.reduce_scatter_gradients import GradientReducer
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model import ports
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.tensor_parallel_decoder import ColumnParallelPort, TensorParallel
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.serve.engine.packed_linear import pack_linears

CONFIG = ModelConfig(37, 16, 2, 4, 2, 4, 22, 12)
refusing, missing = Check("refusing"), Check("missing")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def refusal(technique):
    """The text of the TypeError, "" if there is none."""
    try:
        technique()
    except TypeError as error:
        return str(error)
    return ""


def replaces_a_linear():
    model = Decoder(CONFIG)
    model.blocks[0].attn.q.__class__ = Doubled
    TensorParallel(model, Mesh())
    model(torch.ones(1, 2, dtype=torch.long))


def adds_a_child():
    model = Decoder(CONFIG)
    model.blocks[1].mlp.down.lora_a = nn.Linear(22, 3)
    ports.check_ports(model)


def packs_a_ranks_shards():
    model = decoder_on_meta_device(CONFIG)
    two = type("M", (), {"tp": replace(Mesh().tp, global_ranks=(0, 1)),
                         "split": lambda self, *_: (Mesh().tp, Mesh().tp)})()
    TensorParallel(model, two)
    pack_linears(model)


@refusing.criterion("a linear with a forward of its own", "property")
def _(subject):
    if "would skip Doubled's forward" not in (got := subject(replaces_a_linear)):
        raise CriterionNotMet(f"attn.q, whose output is doubled, is read as it is: {got!r}")


@refusing.criterion("a child that no port applies", "property")
def _(subject):
    if "blocks.1.mlp.down has the child 'lora_a'" not in (got := subject(adds_a_child)):
        raise CriterionNotMet(f"an adapter without a port is as good as none: {got!r}")


@refusing.criterion("a port that another one would drop", "property")
def _(subject):
    if "a port in the place of ColumnParallelPort would drop" not in (got := subject(packs_a_ranks_shards)):
        raise CriterionNotMet(f"a rank packs its shards, and sums nothing: {got!r}")


def names_without_grad(uses):
    """Those of two parameters after a step whose micro-batches use them so."""
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "ab"})
    zero = ZeroDataParallel(model, Mesh().data, 2)
    for name in uses:
        zero.prepare_for_backward(is_last=name is uses[-1])
        model[name].sum().backward()
    zero.finish_grad_sync()
    return zero.names_without_grad


@missing.criterion("names what got no gradient", "property")
def _(subject):
    for uses, want in (("aa", {"b"}), ("b", {"a"})):
        if (got := subject(uses)) != want:
            raise CriterionNotMet(f"micro-batches use {', '.join(uses)}: {got} got none, want {want}")


@missing.criterion("any micro-batch is enough", "property")
def _(subject):
    if got := subject("ab"):
        raise CriterionNotMet(f"each was used in one of two micro-batches, and {got} got none")


def reads_any_linear(*_):
    return ""


def without_children(path, name, linear, chain, *reasons):
    if reason := next(filter(None, reasons), None):
        raise TypeError(f"{path} {name}: {reason}")


class AlwaysPlain(ColumnParallelPort):
    def __init__(self, region):
        super().__init__(region)
        self.is_plain = True


AlwaysPlain.__name__ = ColumnParallelPort.__name__


class MissesNothing(GradientReducer):
    def zero_grad(self):
        super().zero_grad()
        self.names_without_grad = set()


class LastMicroBatchOnly(GradientReducer):
    def prepare_for_backward(self, sync_gradients):
        super().prepare_for_backward(sync_gradients)
        self.names_without_grad = set(self._name_of_param.values())


WRAPPED, CHILD, DROPPED = (criterion.name for criterion in refusing.criteria)
NAMED, ANY = (criterion.name for criterion in missing.criteria)
TENSOR, REDUCER = "nanoinfra.parallel.tensor_parallel_decoder", "nanoinfra.parallel.zero:GradientReducer"
MUTANTS = [
    Mutant("any linear's weight is read", refusing,
           patched(patched(refusal, "nanoinfra.model.ports:why_not_bare", reads_any_linear),
                   f"{TENSOR}:why_not_bare", reads_any_linear), WRAPPED),
    Mutant("children are not looked at", refusing,
           patched(refusal, "nanoinfra.model.ports:_check_linear", without_children), CHILD),
    Mutant("sums over ranks count as plain", refusing,
           patched(refusal, f"{TENSOR}:ColumnParallelPort", AlwaysPlain), DROPPED),
    Mutant("zeros in silence", missing, patched(names_without_grad, REDUCER, MissesNothing), NAMED),
    Mutant("the last micro-batch alone counts", missing,
           patched(names_without_grad, REDUCER, LastMicroBatchOnly), ANY),
]
