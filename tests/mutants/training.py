"""Known-wrong trainers: each slip is one that Adam, or a loss curve, would hide."""
import json
import tempfile
from pathlib import Path

import torch

from nanoinfra.cli import main
from nanoinfra.distributed import comm
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.train import metrics_and_plots
from nanoinfra.train.optimizer import MixedPrecisionOptimizer
from nanoinfra.train.run_directory.run_directory import RunDirectory

FLAGS = ["train", "--model", "test", "--data", "random", "--dtype", "float64", "--steps", "4", "--seq", "16",
         "--global-batch", "7", "--micro-batch", "2", "--optimizer", "sgd", "--lr", "0.3", "--lr-schedule",
         "constant", "--threads", "1"]
PSI = 54592

training = Check("training")


@training.criterion("the losses and norms are one rank's", "parity")
def _(subject):
    want, got = run(main, 1), run(subject, 2)
    for w, g in zip(want, got, strict=True):
        for key in ("loss", "grad_norm", "tokens"):
            if abs(g[key] - w[key]) > 1e-8 * abs(w[key]):
                raise CriterionNotMet(f"step {w['step']}: {key} is {g[key]!r} on two ranks, "
                                      f"{w[key]!r} on one")


@training.criterion("each gradient leaves once a step", "resource")
def _(subject):
    sent = {line["comm"]["data"] for line in run(subject, 2)}
    if sent != {8 * PSI}:
        raise CriterionNotMet(f"{sorted(sent)} bytes on the data axis a step, want {8 * PSI}: 8 a parameter")


@training.criterion("buckets leave while backward goes on", "resource")
def _(subject):
    backward_ends, first_leaves = timeline(subject)
    if not first_leaves < backward_ends:
        raise CriterionNotMet(f"the first bucket left {first_leaves - backward_ends:.4f} s after backward "
                              "had ended")


resuming = Check("resuming")


@resuming.criterion("a run in two parts is the run in one, bit for bit", "parity")
def _(subject):
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder, "whole"), Path(folder, "parts")
        adam = [*FLAGS, "--optimizer", "adamw"]
        main([*adam, "--out", str(whole)])
        subject([*adam, "--steps", "2", "--out", str(parts)])
        subject([*adam, "--resume", "--out", str(parts)])
        want, got = (metrics_and_plots.read_metrics(each / "metrics.jsonl") for each in (whole,
                                                                                         parts))
    for w, g in zip(want, got, strict=True):
        if (w["loss"], w["grad_norm"]) != (g["loss"], g["grad_norm"]):
            raise CriterionNotMet(f"step {w['step']}: loss {g['loss']!r} after resuming, {w['loss']!r} "
                                  "without")


def run(subject, n, *more):
    with tempfile.TemporaryDirectory() as folder:
        rank_pool_for_checks(n).run(subject, [*FLAGS, *more, "--out", folder])
        return metrics_and_plots.read_metrics(Path(folder, "metrics.jsonl"))


def timeline(subject):
    """(end of the last backward, start of the first bucket's all-reduce) of the last step, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        rank_pool_for_checks(2).run(subject, [*FLAGS, "--out", folder, "--trace", f"{folder}/trace.json"])
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    mine = [e for e in events if e["pid"] == 0 and e["ph"] == "X"]
    ends = [e["ts"] + e["dur"] for e in mine if e["name"] == "Backward"]
    leaves = [e["ts"] for e in mine if e["args"].get("tag") == "grads"]
    return max(ends) / 1e6, max(leaves) / 1e6


class NoAllReduce(DataParallel):
    def _start_all_reduce(self, bucket):
        bucket.async_all_reduce = comm.AsyncCollective()
        self._num_launched += 1


class Averages(DataParallel):
    def finish_grad_sync(self):
        for grad in super().finish_grad_sync().values():
            grad.div_(self.axis.size)
        return self.grads


class SendsEveryMicroBatch(DataParallel):
    def prepare_for_backward(self, is_last):
        if self._overlap and all(bucket.params_with_grad for bucket in self.buckets):
            for bucket in self.buckets:  # a second trip, of zeros: right, and twice the bytes
                comm.all_reduce(torch.zeros_like(bucket.flat_grads), self.axis, "grads")
        super().prepare_for_backward(is_last)


class ForgetsEarlierMicroBatches(DataParallel):
    def prepare_for_backward(self, is_last):
        super().prepare_for_backward(is_last)
        for bucket in self.buckets:
            bucket.params_with_grad.clear()


class WaitsForBackward(DataParallel):
    def __init__(self, model, axis, how="overlap", **more):
        super().__init__(model, axis, "buckets", **more)


class ForgetsMoments(MixedPrecisionOptimizer):
    def load_state_dict(self, tensors, steps):
        kept = {n: torch.zeros_like(t) if "/" in n else t for n, t in tensors.items()}
        super().load_state_dict(kept, steps)


class ForgetsItsSteps(MixedPrecisionOptimizer):
    def load_state_dict(self, tensors, steps):
        super().load_state_dict(tensors, 0)


def local_count(micro_batches, axis, *flags):
    valid = sum(batch.num_valid_targets for batch in micro_batches)
    return [valid * axis.size, valid * axis.size, *flags[1:]]


def counts_padding(micro_batches, axis, *flags):
    valid = sum(batch.targets.numel() for batch in micro_batches)
    return comm.all_reduce(torch.tensor([valid, valid, *flags[1:]]), axis, "scalars").tolist()


class ResumesAtTheFirstSample(RunDirectory):
    def load_starting_state(self, *given):
        return super().load_starting_state(*given) | {"consumed": 0}


PARITY, BYTES, OVERLAP = (criterion.name for criterion in training.criteria)
[BITWISE] = (criterion.name for criterion in resuming.criteria)
WRAP = "nanoinfra.parallel.parallelize:DataParallel"
COUNT = "nanoinfra.train.trainer:count_valid_tokens"
OPTIMIZER = "nanoinfra.train.training_pipeline_stage:MixedPrecisionOptimizer"
MUTANTS = [
    Mutant("no all-reduce", training, patched(main, WRAP, NoAllReduce), PARITY),
    Mutant("averages what is normalised already", training, patched(main, WRAP, Averages), PARITY),
    Mutant("forgets earlier micro-batches", training,
           patched(main, WRAP, ForgetsEarlierMicroBatches), PARITY),
    Mutant("divides by the rank's own count", training, patched(main, COUNT, local_count), PARITY),
    Mutant("counts padding", training, patched(main, COUNT, counts_padding), PARITY),
    Mutant("sends at every micro-batch", training, patched(main, WRAP, SendsEveryMicroBatch), BYTES),
    Mutant("waits for the end of backward", training,
           patched(main, WRAP, WaitsForBackward), OVERLAP),
    Mutant("forgets the moments", resuming, patched(main, OPTIMIZER, ForgetsMoments), BITWISE),
    Mutant("forgets Adam's step count", resuming, patched(main, OPTIMIZER, ForgetsItsSteps), BITWISE),
    Mutant("deals the first samples again", resuming,
           patched(main, "nanoinfra.train.trainer:RunDirectory", ResumesAtTheFirstSample), BITWISE),
]
