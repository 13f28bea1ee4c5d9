"""Known-wrong tensor parallelism: sums forgotten or made twice, a bias of every rank, logits in one piece."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.config import ModelConfig
from nanoinfra.data.sample_order import IGNORE
from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import Pending
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import shapes
from nanoinfra.formulas.tensor_parallel import tensor_sent
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.init import draw, generator
from nanoinfra.model.weights.fill_model import empty
from nanoinfra.parallel.parallelize import Composed, Plan
from nanoinfra.parallel.sequence_parallel import Cut
from nanoinfra.parallel.tensor_parallel import RowLinear, Whole
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import HeadLoss
from nanoinfra.train.optimizer import clip

B, T, V = 3, 7, 201                          # a vocabulary that outweighs everything else
CASES = [("gpt2", 2, "none"), ("llama", 4, "none"), ("qwen3", 2, "none"), ("gpt2", 2, "keep"),
         ("llama", 2, "gather")]
tensor = Check("tensor")


@tensor.criterion("the loss is one rank's", "property")
def _(subject):
    [want] = rank_pool_for_checks(1).run(step, "llama", 1, "none")
    for rank, got in enumerate(rank_pool_for_checks(2).run(subject, "llama", 2, "none")):
        if not abs(got["loss"] / want["loss"] - 1) < 1e-12:
            raise CriterionNotMet(f"rank {rank}: the loss is {got['loss']}, want {want['loss']}")


@tensor.criterion("the loss stands large logits", "property")
def _(subject):
    [want] = rank_pool_for_checks(1).run(step, "llama", 1, "none", 300.0)
    for rank, got in enumerate(rank_pool_for_checks(2).run(subject, "llama", 2, "none", 300.0)):
        if not abs(got["loss"] / want["loss"] - 1) < 1e-9:
            raise CriterionNotMet(f"rank {rank}: the loss is {got['loss']}, want {want['loss']}: exp of a "
                                  "large number overflows, take the maximum off first")


@tensor.criterion("gradients are one rank's", "parity")
def _(subject):
    for family, tp, sp in CASES:
        [want] = rank_pool_for_checks(1).run(step, family, 1, "none")
        for rank, got in enumerate(rank_pool_for_checks(tp).run(subject, family, tp, sp)):
            for name, (index, grad) in got["grads"].items():
                _, whole = want["grads"][name]
                off = (grad - whole[index]).norm() / max(whole.norm(), 1e-6 * want["norm"])
                if not off < 1e-10:
                    raise CriterionNotMet(f"rank {rank}: {name} of {family}, tp {tp}, sp {sp}, is off by "
                                          f"{off:.1e} of its size")


@tensor.criterion("the norm counts each number once", "parity")
def _(subject):
    for family, tp, sp in CASES:
        [want] = rank_pool_for_checks(1).run(step, family, 1, "none")
        for rank, got in enumerate(rank_pool_for_checks(tp).run(subject, family, tp, sp)):
            if not abs(got["norm"] / want["norm"] - 1) < 1e-9:
                raise CriterionNotMet(f"rank {rank}: the norm is {got['norm']}, want {want['norm']}")


@tensor.criterion("no tensor is larger than a rank's logits", "resource")
def _(subject):
    for family, tp, sp in CASES:
        for rank, got in enumerate(rank_pool_for_checks(tp).run(subject, family, tp, sp)):
            if got["largest"] > B * T * -(-V // tp):
                raise CriterionNotMet(f"rank {rank} makes a tensor of {got['largest']} numbers, want at most "
                                      f"{B * T * -(-V // tp)}, its share of the logits")


@tensor.criterion("sends what the paper says", "resource")
def _(subject):
    for family, tp, sp in CASES:
        wanted = tensor_sent(config(family), tp, B, T, dtype_bytes=8, grad_bytes=8, sp=sp)
        for rank, got in enumerate(rank_pool_for_checks(tp).run(subject, family, tp, sp)):
            for key in wanted | got["sent"]:
                if got["sent"].get(key) != wanted.get(key):
                    raise CriterionNotMet(f"rank {rank}, {family}, sp {sp}: {' '.join(key)} is "
                                          f"{got['sent'].get(key)} (calls, bytes), want {wanted.get(key)}")


def step(family, tp, sp, scale=1.0):
    """One rank's part of a training step: gradients with their places, norm, loss, calls and bytes sent."""
    mesh, cfg = Mesh(tp=tp), config(family)
    parallel = Composed(empty(cfg), mesh, Plan(sp=sp, dtype=torch.float64), drawn(cfg, scale))
    x, y = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(1))
    y[0, 0] = IGNORE
    mesh.ledger.take()
    parallel.data.begin_step()
    parallel.data.before_backward(last=True)
    with Largest() as seen:
        loss = parallel.loss(parallel.model.hidden(x), y, B * T - 1)
        loss.backward()
    grads, sent = parallel.finish(), {}
    for row in mesh.ledger.take():
        calls, payload = sent.get((row.op, row.tag), (0, 0))
        sent[row.op, row.tag] = calls + 1, payload + row.payload
    norm = clip(dict(grads), 0, axes=[mesh.tp], counts=parallel.tensor.counts)
    found = {name: (tuple(slice(*ends) for ends in parallel.box(name)), grad.clone())
             for name, grad in grads.items()}
    return {"grads": found, "norm": norm, "loss": loss.item(), "sent": sent, "largest": seen.numel}


def config(family):
    grouped = family != "gpt2"
    return ModelConfig(V, 16, 2, 4, 2 if grouped else 4, 4, 22, 12, tied=False, family=family)


def drawn(cfg, scale):
    """Weights that leave nothing at 0 or 1; those of the head times `scale`."""
    every = shapes(cfg)

    def read(name, part):
        noise = torch.empty(every[name]).normal_(0, 0.3, generator=generator(0, name))
        return (draw(name, every[name], cfg.layers, 0) + noise)[part] * (scale if "head" in name else 1)
    return read


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


class NeverSumsBack(Whole):
    def back(self, grad, tag):
        return Pending(grad)


class SumsBackTwice(Whole):
    def spread(self, grad, tag):
        return comm.all_reduce(grad.clone(), self.axis, tag)


class BiasOfEveryRank(RowLinear):
    def forward(self, x):
        return self.region.leave(F.linear(x, self.weight, self.bias))


class ForgetsSharedHeads(TensorParallel):
    def finish(self, grads):
        self.shared = []
        return super().finish(grads)


class ForgetsNorms(TensorParallel):
    def finish(self, grads):
        self.parts = []
        return super().finish(grads)


class CountsEveryCopy(TensorParallel):
    def counts(self, name):
        return True


class KeepsAnyway(Cut):
    def __init__(self, axis, keep):
        super().__init__(axis, True)


class WholeLogits(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, targets, count):
        logits = self.head(hidden).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") / count


class SkipsTheTarget(HeadLoss):
    """Counts, in the loss, a target as this rank's wherever it lies."""

    def __init__(self, head):
        super().__init__(head)
        self.place = self.place[0], 0


def without_the_maximum(logits, axis, wide):
    return comm.all_reduce(logits.to(wide).exp().sum(1), axis, "loss").log_()


def replaced(name, kind, module="megatron"):
    return patched(step, f"nanoinfra.parallel.{module}:{name}", kind)


LOSS, LARGE, GRADS, NORM, HELD, SENT = (criterion.name for criterion in tensor.criteria)
MUTANTS = [
    Mutant("a column linear without its backward all-reduce", tensor,
           replaced("Whole", NeverSumsBack), GRADS),
    Mutant("a sum made twice", tensor, replaced("Whole", SumsBackTwice), GRADS),
    Mutant("a bias added by every rank", tensor, replaced("RowLinear", BiasOfEveryRank), GRADS),
    Mutant("shared KV heads' gradients not summed", tensor,
           replaced("TensorParallel", ForgetsSharedHeads, "compose"), GRADS),
    Mutant("norms' gradients not summed under sp", tensor,
           replaced("TensorParallel", ForgetsNorms, "compose"), GRADS),
    Mutant("the norm counts what every rank has", tensor,
           replaced("TensorParallel", CountsEveryCopy, "compose"), NORM),
    Mutant("a loss that misses the maximum", tensor,
           replaced("_log_sum_exp", without_the_maximum, "vocabulary"), LARGE),
    Mutant("every target is mine", tensor, replaced("HeadLoss", SkipsTheTarget, "compose"), LOSS),
    Mutant("keeps what it says it gathers again", tensor, replaced("Cut", KeepsAnyway), SENT),
    Mutant("all logits on every rank", tensor, replaced("HeadLoss", WholeLogits, "compose"), HELD),
]
