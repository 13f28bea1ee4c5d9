"""The flags of `nanoinfra train`: their groups have room, and a flag is found by its name alone."""
import re
from dataclasses import fields

import pytest

from nanoinfra.cli import main
from nanoinfra.parse_and_run_command import _flag_names, parse_command_line
from nanoinfra.train.config import (
    AxesFlags,
    MemoryFlags,
    TrainFlags,
    flags_by_name,
    group_by_flag,
    make_train_flags,
    replace_flags,
)

FLAGS = """--attention --betas --clip --cp --data --device --dp --dtype --emulate-link --eval-every --freeze
--global-batch --grad-dtype --grad-sync --keep-checkpoints --lr --lr-schedule --max-restarts --max-seconds
--micro-batch --min-lr --model --no-resume --no-sp --no-sp-save-gathered --no-untied --nproc --optimizer --out
--pp --recompute --resume --resume-from --save-every --schedule --seed --seq --sp --sp-save-gathered --steps
--threads --timeout --tp --trace --untied --virtual-stages --vocab --warmup --weight-decay --zero""".split()
GROUPS = fields(TrainFlags)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_a_group_has_at_most_twelve_flags(group):
    assert 0 < len(fields(group.default_factory)) <= 12


def test_the_command_line_has_the_flags_that_it_always_had():
    assert sorted(_flag_names(TrainFlags)) == sorted(FLAGS)


def test_no_two_groups_have_a_flag_of_one_name():
    assert len(group_by_flag()) == sum(len(fields(group.default_factory)) for group in GROUPS)


def test_help_shows_each_group_under_its_title(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    _, *parts = re.split(r"(\w+) options [ \u2500]", said)
    boxes = dict(zip(parts[::2], parts[1::2]))
    assert list(boxes) == [group.name for group in GROUPS]
    for group in GROUPS:
        assert group.default_factory.__doc__.split(":")[0] in boxes[group.name]
        assert all(f"--{flag.name.replace('_', '-')} " in boxes[group.name].replace(",", " ")
                   for flag in fields(group.default_factory))


def test_flags_are_made_and_replaced_by_name():
    flags = make_train_flags(zero=2, dp=4, dtype="float64")
    assert flags == parse_command_line("train --zero 2 --dp 4 --dtype float64".split())
    assert replace_flags(flags, zero=0, tp=2).memory == MemoryFlags()
    assert replace_flags(flags, zero=0, tp=2).axes == AxesFlags(dp=4, tp=2)
    assert flags_by_name(flags)["zero"] == 2 and flags_by_name(flags).keys() == group_by_flag().keys()
    with pytest.raises(ValueError, match="no flag is named sharding, zerro"):
        make_train_flags(zerro=2, sharding=1)
