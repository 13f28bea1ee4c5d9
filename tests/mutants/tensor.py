"""Known-wrong tensor parallelism: sums forgotten or made twice, a bias of every rank, logits in one piece."""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.config import ModelConfig
from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed import comm
from nanoinfra.distributed.comm import AsyncCollective
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.initialization import draw_initial_tensor, named_generator
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import ParallelChunk, ParallelConfig
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel import TensorParallelRegion
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.train.optimizer import unscale_and_clip_grads

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
        wanted = tp_collectives_per_step(config(family), tp, B, T, dtype_bytes=8, grad_bytes=8, sp=sp)
        for rank, got in enumerate(rank_pool_for_checks(tp).run(subject, family, tp, sp)):
            for key in wanted | got["sent"]:
                if got["sent"].get(key) != wanted.get(key):
                    raise CriterionNotMet(f"rank {rank}, {family}, sp {sp}: {' '.join(key)} is "
                                          f"{got['sent'].get(key)} (calls, bytes), want {wanted.get(key)}")


def step(family, tp, sp, scale=1.0):
    """One rank's part of a training step: gradients with their places, norm, loss, calls and bytes sent."""
    mesh, cfg = Mesh(tp=tp), config(family)
    parallel = ParallelChunk(decoder_on_meta_device(cfg), mesh, ParallelConfig(sequence_parallel=sp,
                                                                               dtype=torch.float64),
                             drawn(cfg,
                                   scale))
    x, y = torch.randint(V, (2, B, T), generator=torch.Generator().manual_seed(1))
    y[0, 0] = IGNORE_INDEX
    mesh.comm_log.take_records()
    parallel.data_parallel.zero_grad()
    parallel.data_parallel.prepare_for_backward(is_last=True)
    with Largest() as seen:
        loss = parallel.loss_head(parallel.model.hidden_states(x), y).sum() / (B * T - 1)
        loss.backward()
    grads, sent = parallel.finish_grad_sync(), {}
    for row in mesh.comm_log.take_records():
        calls, payload = sent.get((row.op, row.tag), (0, 0))
        sent[row.op, row.tag] = calls + 1, payload + row.payload_bytes
    norm = unscale_and_clip_grads(dict(grads), 0, axes=[mesh.tp],
                                  counted_in_norm=parallel.tensor_parallel.counted_in_norm)
    found = {name: (parallel.optimizer_shard(name).slices_within(), grad.clone())
             for name, grad in grads.items()}
    return {"grads": found, "norm": norm, "loss": loss.item(), "sent": sent, "largest": seen.numel}


def config(family):
    grouped = family != "gpt2"
    return ModelConfig(V, 16, 2, 4, 2 if grouped else 4, 4, 22, 12, tied=False, family=family)


def drawn(cfg, scale):
    """Weights that leave nothing at 0 or 1; those of the head times `scale`."""
    every = parameter_shapes(cfg)

    def read(name, part):
        noise = torch.empty(every[name]).normal_(0, 0.3, generator=named_generator(0, name))
        return (draw_initial_tensor(name, every[name], cfg.layers,
                                    0) + noise)[part] * (scale if "head" in name else 1)
    return read


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return out


class NeverSumsBack(TensorParallelRegion):
    def reduce_input_grad(self, grad, tag):
        return AsyncCollective(grad)


class SumsBackTwice(TensorParallelRegion):
    def gather_output_grad(self, grad, tag):
        return comm.all_reduce(grad.clone(), self.axis, tag)


def bias_of_every_rank(region, y, linear):
    return region.reduce_from_region(F.linear(y, linear.weight, linear.bias))


class ForgetsSharedHeads(TensorParallel):
    def all_reduce_partial_grads(self, grads):
        self._replicated_kv_names = []
        return super().all_reduce_partial_grads(grads)


class ForgetsNorms(TensorParallel):
    def all_reduce_partial_grads(self, grads):
        self._partial_grad_names = []
        return super().all_reduce_partial_grads(grads)


class CountsEveryCopy(TensorParallel):
    def counted_in_norm(self, name):
        return True


class KeepsAnyway(SequenceParallelRegion):
    def __init__(self, axis, save_gathered):
        super().__init__(axis, True)


class WholeLogits(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, targets):
        logits = self.head(hidden).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")


class SkipsTheTarget(VocabParallelCrossEntropy):
    """Counts, in the loss, a target as this rank's wherever it lies."""

    def __init__(self, head):
        super().__init__(head)
        self._region_and_start = self._region_and_start[0], 0


def without_the_maximum(logits, axis, wide):
    return comm.all_reduce(logits.to(wide).exp().sum(1), axis, "loss").log_()


def replaced(name, kind, module="tensor_parallel_decoder"):
    return patched(step, f"nanoinfra.parallel.{module}:{name}", kind)


LOSS, LARGE, GRADS, NORM, HELD, SENT = (criterion.name for criterion in tensor.criteria)
MUTANTS = [
    Mutant("a column linear without its backward all-reduce", tensor,
           replaced("TensorParallelRegion", NeverSumsBack), GRADS),
    Mutant("a sum made twice", tensor, replaced("TensorParallelRegion", SumsBackTwice), GRADS),
    Mutant("a bias added by every rank", tensor, replaced("row_parallel_linear", bias_of_every_rank), GRADS),
    Mutant("shared KV heads' gradients not summed", tensor,
           replaced("TensorParallel", ForgetsSharedHeads, "parallelize"), GRADS),
    Mutant("norms' gradients not summed under sp", tensor,
           replaced("TensorParallel", ForgetsNorms, "parallelize"), GRADS),
    Mutant("the norm counts what every rank has", tensor,
           replaced("TensorParallel", CountsEveryCopy, "parallelize"), NORM),
    Mutant("a loss that misses the maximum", tensor,
           replaced("_log_sum_exp", without_the_maximum, "vocab_parallel"), LARGE),
    Mutant("every target is mine", tensor,
           replaced("VocabParallelCrossEntropy", SkipsTheTarget, "parallelize"), LOSS),
    Mutant("keeps what it says it gathers again", tensor, replaced("SequenceParallelRegion", KeepsAnyway),
           SENT),
    Mutant("all logits on every rank", tensor,
           replaced("VocabParallelCrossEntropy", WholeLogits, "parallelize"), HELD),
]
