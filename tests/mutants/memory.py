"""Known-wrong sayings of what a run will hold.

`keep` gives what a stage keeps for backward, `refuse` what is said of a run on a machine of so many bytes,
"" where it fits; a mutant of the library is patched in.
"""
import re
from unittest import mock

from nanoinfra.config import config_for_size
from nanoinfra.formulas import pipeline, training_peak_memory
from nanoinfra.formulas.saved_activations import embedding_and_head_bytes_by_term, saved_activation_bytes
from nanoinfra.formulas.training_peak_memory import ParallelLayout, TrainingStepConfig
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.parse_and_run_command import parse_command_line
from nanoinfra.train import config
from nanoinfra.train.launch import memory_check

kept, refusal = Check("kept"), Check("refusal")
CONFIG, RECIPE = config_for_size("nano", tied=False), TrainingStepConfig(256, 8, 6)
TWO = "--model nano --dp 2 --micro-batch 64"


def keep(layout, stage=0):
    return training_peak_memory.stage_activation_bytes(CONFIG, layout, RECIPE, stage)


@kept.criterion("one rank keeps what one forward leaves", "parity")
def _(subject):
    want = saved_activation_bytes(CONFIG, 8, 256, 4)
    if (got := subject(ParallelLayout())) != want:
        raise CriterionNotMet(f"{got} bytes, want {want}")


@kept.criterion("a stage keeps the micro-batches that its schedule has under way", "parity")
def _(subject):
    one = subject(ParallelLayout(pp=2, schedule="1f1b")) / 2                       # at the first stage of two
    if (got := subject(ParallelLayout(pp=2, schedule="gpipe"))) != 6 * one:
        raise CriterionNotMet(f"gpipe keeps {got} bytes of six micro-batches of {one}")


def refuse(line, has):
    flags = parse_command_line(["train", *line.split()])
    with mock.patch.object(memory_check, "host_memory_limit_bytes", lambda: int(has)):
        try:
            memory_check.check_memory_fits(flags, config.num_ranks_to_start(flags.axes, None))
        except ValueError as error:
            return str(error)
    return ""


@refusal.criterion("all ranks of this machine count", "property")
def _(subject):
    two, eight = (subject(f"--model test --data random --dp {n}", 1e9) for n in (2, 8))
    if two or not eight:
        raise CriterionNotMet("a gigabyte holds two processes, and not eight")


@refusal.criterion("what is to be tried fits", "property")
def _(subject):
    for has in (3e9, 1.5e9, 0.9e9):
        tried = re.search("; try (.*)", subject(TWO, has))
        kept = "" if tried and "--micro-batch" in tried[1] else "--micro-batch 64"
        if not tried or refuse(f"--model nano --dp 2 {kept} {tried[1]}", has):
            raise CriterionNotMet(f"on a machine of {has} bytes {tried and tried[1]}")


def without_logits(*args):
    return {**embedding_and_head_bytes_by_term(*args), "logits": 0}


def one_at_a_time(kind, p, r, m, v=1):
    return pipeline.predicted_micro_batches_in_flight("1f1b", p, r, m)


ALONE, UNDER_WAY = (c.name for c in kept.criteria)
EVERY, FITS = (c.name for c in refusal.criteria)
MUTANTS = [
    Mutant("logits are forgotten", kept,
           patched(keep, "nanoinfra.formulas.training_peak_memory:embedding_and_head_bytes_by_term",
                   without_logits), ALONE),
    Mutant("every schedule keeps what 1f1b does", kept,
           patched(keep, "nanoinfra.formulas.training_peak_memory:predicted_micro_batches_in_flight",
                   one_at_a_time), UNDER_WAY),
    Mutant("one rank stands for all", refusal,
           patched(refuse, "nanoinfra.train.launch.memory_check:ranks_sharing_memory", lambda *_: range(1)),
           EVERY),
    Mutant("the first remedy will do", refusal,
           patched(refuse, "nanoinfra.train.launch.memory_check:_fits", lambda *_: True), FITS),
]
