"""Known-wrong ZeROs, which train as if nothing were amiss: not cut, not freed, sent twice, stale."""
import contextlib
import io
import tempfile
from pathlib import Path

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.reduce_scatter_gradients import GradientReducer
from nanoinfra.formulas import zero as formulas
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel import zero as module
from nanoinfra.parallel.parallelize import fsdp_units
from nanoinfra.parallel.vocab_parallel import VocabParallelCrossEntropy
from nanoinfra.parallel.zero import ZeroDataParallel
from nanoinfra.train.config import make_train_flags
from nanoinfra.train.loss import count_valid_tokens
from nanoinfra.train.optimizer import MixedPrecisionOptimizer, unscale_and_clip_grads
from nanoinfra.train.trainer import train

N, STEPS, BUCKET = 2, 3, 1 << 16
CONFIG = ModelConfig(63, 64, 4, 4, 2, 16, 176, 16)       # an odd vocabulary; blocks larger than the embedding
zero, scaled = Check("zero"), Check("scaled")


@zero.criterion("after three steps the weights are one rank's", "parity")
def _(subject):
    for stage in (1, 2, 3):
        [want] = rank_pool_for_checks(1).run(run, ZeroDataParallel, stage, "sgd")
        got = rank_pool_for_checks(N).run(run, subject, stage, "sgd")
        for rank, mine in enumerate(got):
            for name, x in mine["weights"].items():
                assert_same_tensor(f"{name} at stage {stage}", x, want["weights"][name], rank, rtol=1e-10)


@zero.criterion("sends what the paper says", "resource")
def _(subject):
    for stage in (1, 2, 3):
        wanted = formulas.zero_payload_bytes(CONFIG, N, stage, 2, "float64")
        for rank, mine in enumerate(rank_pool_for_checks(N).run(run, subject, stage)):
            for op, bytes_ in wanted.items():
                if mine["sent"].get(op) != bytes_:
                    raise CriterionNotMet(f"rank {rank}: {mine['sent'].get(op)} bytes of {op} a step at "
                                          f"stage {stage}, want {bytes_}")


@zero.criterion("a rank holds its part at every moment", "resource")
def _(subject):
    [alone] = rank_pool_for_checks(1).run(run, ZeroDataParallel, 1)
    more = alone["peak"] - sum(formulas.zero_model_state_bytes(CONFIG, 1, 1,
                                                               "float64").values())    # activations, mostly
    for stage in (1, 2, 3):
        states = sum(formulas.zero_model_state_bytes(CONFIG, N, stage, "float64").values())
        most = states + formulas.zero_buffer_bytes(CONFIG, N, stage, "float64", bucket_bytes=BUCKET) + more
        for rank, mine in enumerate(rank_pool_for_checks(N).run(run, subject, stage)):
            if mine["peak"] > most:
                raise CriterionNotMet(f"rank {rank} holds {mine['peak']:,} bytes at stage {stage} "
                                      f"({mine['when']}), want at most {most:,}")


@scaled.criterion("clipped float16 steps go as far as float32's", "property")
def _(subject):
    still, wanted = losses(train, "float32", lr=0.0), losses(train, "float32")
    got = losses(subject, "float16")
    if not distance(got, wanted) < 0.1 * distance(still, wanted):
        raise CriterionNotMet(f"losses {got}, want about {wanted}: the scale was not undone before clipping?")


@scaled.criterion("an overflow leaves the weights as they were", "property")
def _(subject):
    overflowing = patched(subject, "nanoinfra.parallel.parallelize:VocabParallelCrossEntropy", Overflowing)
    still, got = losses(train, "float16", lr=0.0), losses(overflowing, "float16")
    if got != still:
        raise CriterionNotMet(f"losses {got}, want {still}: every gradient is infinite, so no step was to be "
                              "made")


def run(kind, stage, name="adamw"):
    """Three steps of two micro-batches of the decoder, cut by `kind`: weights, bytes sent and held.

    Nothing is clipped: clipping, like Adam, hides gradients that are all too large by one factor.
    """
    mesh = Mesh(dp=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    with LiveTensorBytes() as storages:
        net = init_weights(Decoder(CONFIG), seed=0).double()
        last = VocabParallelCrossEntropy(net.head)
        shared = kind(net, mesh.data, stage, fsdp_units(net, last), bucket_bytes=BUCKET)
        optimizer = MixedPrecisionOptimizer(shared.param_shards, name)
        optimizer.state_dict()
        storages.mark_module_boundaries(torch.nn.ModuleList([net, last]), mesh.comm_log)
        for _ in range(STEPS):
            mine = batches(mesh.data)
            [count] = count_valid_tokens(mine, mesh.data)
            mesh.comm_log.take_records()
            shared.zero_grad()
            for i, batch in enumerate(mine):
                loss = last(net.hidden_states(batch.tokens), batch.targets).sum() / count
                shared.prepare_for_backward(is_last=i == len(mine) - 1)
                loss.backward()
            grads = shared.finish_grad_sync()
            optimizer.step(grads, lr=1e-2)
            grads = None
            shared.all_gather_params()
            rows = mesh.comm_log.take_records()
    when, peak = max(storages.marks, key=lambda mark: mark[1])
    sent = {op: sum(row.payload_bytes for row in rows if row.op == op) for op in {row.op for row in rows}}
    return {"weights": gathered(shared, mesh.data), "sent": sent, "peak": peak, "when": when}


def batches(data):
    random = torch.Generator().manual_seed(1)
    x, y = torch.randint(CONFIG.vocab, (2, 8, 6), generator=random)
    return list(map(Batch, x[data.rank::data.size].chunk(2), y[data.rank::data.size].chunk(2)))


def gathered(shared, data):
    """The weights that a next forward would use, whole."""
    for unit in shared.param_groups:
        unit.start_all_gather()
        unit.wait_all_gather()
    return {part.name: part.param.detach().clone() for part in shared.sharded_params}


def losses(subject, dtype, lr=2.0):
    with tempfile.TemporaryDirectory() as out:
        flags = make_train_flags(model="test", dtype=dtype, data="random", seq=16, micro_batch=4, threads=1,
                                 optimizer="sgd", lr=lr, warmup=0, clip=0.2, steps=6, out=Path(out))
        with contextlib.redirect_stdout(io.StringIO()):
            return [line["loss"] for line in subject(flags)]


def distance(some, others):
    return sum(abs(a - b) for a, b in zip(some, others, strict=True))


class Overflowing(VocabParallelCrossEntropy):
    def forward(self, hidden, targets):
        hidden.register_hook(lambda gradient: gradient * float("inf"))
        return super().forward(hidden, targets)


class UnshardedOptimizer(ZeroDataParallel):
    """Gathers gradients where it should gather weights: right, and no optimizer state is saved."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        if self.stage < 3:
            self.param_shards = {part.name: part.unsharded for part in self.sharded_params}

    def finish_grad_sync(self):
        found = super().finish_grad_sync()
        if self.stage == 3:
            return found
        whole = {name: comm.all_gather(grad, self.axis, "weights") for name, grad in found.items()}
        return {name: grad.flatten(0, 1) for name, grad in whole.items()}

    def all_gather_params(self, include_frozen=False):
        if self.stage == 3 or not hasattr(self, "published"):
            super().all_gather_params(include_frozen)
        self.published = True


class KeepsGradients(GradientReducer):
    """Each bucket leaves in time, and stays here as well until the step is over."""

    def zero_grad(self):
        super().zero_grad()
        self.kept = []

    def _start_reduce_scatter(self, bucket):
        if bucket.flat_grads is not None:
            self.kept.append(bucket.flat_grads)
        super()._start_reduce_scatter(bucket)


class ReducesTwice(GradientReducer):
    def _wait_in_flight(self):
        again = self._in_flight
        super()._wait_in_flight()
        if again:
            self._in_flight = again
            super()._wait_in_flight()


class SendsTwice(GradientReducer):
    def _start_reduce_scatter(self, bucket):
        comm.reduce_scatter(torch.zeros(bucket.shape, dtype=torch.float64), self.axis, "grads")
        super()._start_reduce_scatter(bucket)


class ForgetsTheOtherUse(GradientReducer):
    def _wait_in_flight(self):
        for leaf in self._in_flight[0].params if self._in_flight else ():
            if leaf.name == "embed.weight":
                self.grads.pop(leaf.name, None)
        super()._wait_in_flight()


class NeverFrees(module.FSDPParamGroup):
    born = False

    def reshard(self):
        if not self.born:
            super().reshard()
        self.born = True


class StaleWeights(ZeroDataParallel):
    def all_gather_params(self, include_frozen=False):
        if not hasattr(self, "published") or self.stage == 3:
            super().all_gather_params(include_frozen)
        self.published = True


def clips_before_unscaling(grads, limit, scale, *over):
    norm = unscale_and_clip_grads(grads, limit, 1.0, *over)
    torch._foreach_div_(list(grads.values()), scale)
    return norm / scale


def calls_it_finite(grads, *how):
    norm = unscale_and_clip_grads(grads, *how)
    return norm if norm < float("inf") else 1.0


def with_reducer(kind):
    return patched(ZeroDataParallel, "nanoinfra.parallel.zero:GradientReducer", kind)


PARITY, SENT, HELD = (criterion.name for criterion in zero.criteria)
CLIPPED, SKIPPED = (criterion.name for criterion in scaled.criteria)
CLIP = "nanoinfra.train.training_pipeline_stage:unscale_and_clip_grads"
MUTANTS = [
    Mutant("an optimizer that shards nothing", zero, UnshardedOptimizer, HELD),
    Mutant("gradients kept whole", zero, with_reducer(KeepsGradients), HELD),
    Mutant("parameters never freed", zero,
           patched(ZeroDataParallel, "nanoinfra.parallel.zero:FSDPParamGroup", NeverFrees), HELD),
    Mutant("a bucket added twice", zero, with_reducer(ReducesTwice), PARITY),
    Mutant("a bucket sent twice", zero, with_reducer(SendsTwice), SENT),
    Mutant("one use of the tied weight forgotten", zero, with_reducer(ForgetsTheOtherUse), PARITY),
    Mutant("a stale shard: weights not gathered after the step", zero, StaleWeights, PARITY),
    Mutant("the scale undone after clipping", scaled, patched(train, CLIP, clips_before_unscaling), CLIPPED),
    Mutant("an overflow stepped on", scaled, patched(train, CLIP, calls_it_finite), SKIPPED),
]
