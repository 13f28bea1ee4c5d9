"""Known-wrong checks of flags: a technique that nobody asks, flags of an earlier version that are lost."""
from nanoinfra import renamed_flags
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.parallel.refusals import zero
from nanoinfra.train.config import (
    check_combinations,
    flags_to_dict,
    global_batch_and_num_micro_batches,
    group_by_flag,
    make_train_flags,
)
from nanoinfra.train.refusals.techniques import TECHNIQUES

combinations, stored = Check("refused combinations"), Check("stored flags")
OLD = {"mesh": {"dp": 2, "zero": 1, "wire": ["dp=1e-6,1e10"]}, "run": {"keep": 1, "timeout": 60.0}}


def refusal(world, **values):
    """What is said of these flags on `world` ranks, "" where they may be combined."""
    try:
        check_combinations(make_train_flags(model="test", **values), world)
    except ValueError as error:
        return str(error)
    return ""


@combinations.criterion("every technique is asked", "property")
def _(subject):
    if "use --zero 1" not in (said := subject(2, zero=2, pp=2)):
        raise CriterionNotMet(f"of --zero 2 --pp 2 it says {said!r}")


@combinations.criterion("a schedule is asked for with the micro-batches of one rank", "property")
def _(subject):
    given = dict(micro_batch=1, global_batch=6, pp=2, schedule="interleaved", virtual_stages=2)
    if "does not divide 3" not in (said := subject(4, **given)):
        raise CriterionNotMet(f"six sequences on two data ranks: three micro-batches, and it says {said!r}")
    if said := subject(2, **given):
        raise CriterionNotMet(f"six micro-batches on two stages can be had, and it says {said!r}")


def read_flags(groups):
    return renamed_flags.with_new_flag_names({"flags": groups}, group_by_flag())["flags"]


@stored.criterion("old names are read", "parity")
def _(subject):
    names = {name for flags in subject(OLD).values() for name in flags}
    if names != (want := {"dp", "zero", "emulate_link", "keep_checkpoints", "timeout"}):
        raise CriterionNotMet(f"the flags are {sorted(names)}; want {sorted(want)}")


@stored.criterion("a flag is found whatever group held it", "parity")
def _(subject):
    got, now = subject(OLD), flags_to_dict(make_train_flags(dp=2, zero=1, timeout=60.0))
    for group, name in (("axes", "dp"), ("memory", "zero"), ("launch", "timeout")):
        if got.get(group, {}).get(name) != now[group][name]:
            raise CriterionNotMet(f"--{name} is not in {group}: {got}")


def of_one_data_rank(data, dp):
    return global_batch_and_num_micro_batches(data, 1)


def in_the_groups_of_then(groups):
    new = renamed_flags.RENAMED_FLAGS["train"]
    return {group: {new.get(name, name): value for name, value in flags.items()}
            for group, flags in groups.items()}


ASKED, MICRO_BATCHES = (criterion.name for criterion in combinations.criteria)
NAMES, FOUND = (criterion.name for criterion in stored.criteria)
OTHER_NAMES = {old: new for old, new in renamed_flags.RENAMED_FLAGS["train"].items() if old != "wire"}
MUTANTS = [
    Mutant("a technique is left out of the list", combinations,
           patched(refusal, "nanoinfra.train.refusals.techniques:TECHNIQUES",
                   tuple(each for each in TECHNIQUES if each is not zero)), ASKED),
    Mutant("the whole batch counts as one rank's", combinations,
           patched(refusal, "nanoinfra.train.config:global_batch_and_num_micro_batches", of_one_data_rank),
           MICRO_BATCHES),
    Mutant("an alias that is not read", stored,
           patched(read_flags, "nanoinfra.renamed_flags:RENAMED_FLAGS", {"train": OTHER_NAMES}), NAMES),
    Mutant("a flag stays in the group that held it", stored, in_the_groups_of_then, FOUND),
]
