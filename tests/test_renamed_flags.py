"""Old flags are answered with their new names, and new names are flags that exist."""
import json
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.parse_and_run_command import _flag_names, _kinds
from nanoinfra.renamed_flags import RENAMED_FLAGS, check_no_renamed_flags, with_new_flag_names
from nanoinfra.train.config import TrainFlags, flags_to_dict, group_by_flag, make_train_flags
from nanoinfra.train.run_directory.check_resume_and_report_changes import describe_changed_flags

FIXTURE = Path(__file__).parent / "fixtures" / "run_before_renaming"
OLD_AND_NEW = [(command, f"--{old.replace('_', '-')}", f"--{new.replace('_', '-')}")
               for command, renamed in RENAMED_FLAGS.items() for old, new in renamed.items()]


@pytest.mark.parametrize("command", RENAMED_FLAGS)
def test_new_names_are_flags_and_old_ones_are_not(command):
    flags = set(_flag_names(_kinds()[command]))
    for _, old, new in (row for row in OLD_AND_NEW if row[0] == command):
        assert new in flags and old not in flags


@pytest.mark.parametrize("command, old, new", OLD_AND_NEW)
def test_an_old_flag_is_answered_with_its_new_name(capsys, command, old, new):
    for words in ([old, "2"], [f"{old}=2"]):
        assert main([command, *words]) == 2
        assert capsys.readouterr().err == f"nanoinfra: {old} is now {new}; see nanoinfra {command} --help\n"


def test_an_old_switch_is_answered_however_it_is_spelled():
    for word, says in (("--sp_keep", "--sp-keep is now --sp-save-gathered"),
                       ("--no-sp-keep", "--no-sp-keep is now --no-sp-save-gathered")):
        with pytest.raises(ValueError, match=says):
            check_no_renamed_flags(["train", word])


def test_a_flag_of_another_command_or_a_value_is_no_old_flag():
    check_no_renamed_flags([])
    check_no_renamed_flags(["generate", "model", "--seats"])
    check_no_renamed_flags(["train", "--data", "keep", "--keep-checkpoints", "2"])


def test_what_a_run_has_stored_is_read_under_new_names():
    stored = {"step": 3, "flags": {"mesh": {"wire": [], "dp": 2}, "run": {"keep": 1, "seconds": None}}}
    assert with_new_flag_names(stored, group_by_flag()) == {"step": 3, "flags": {
        "launch": {"emulate_link": []}, "axes": {"dp": 2},
        "run": {"keep_checkpoints": 1, "max_seconds": None}}}
    for broken in ({"step": 3}, {"flags": {"mesh": 7}}, {"flags": {"run": 7}}, {"flags": 7}):
        assert with_new_flag_names(broken, group_by_flag()) == broken
    later = {"flags": {"mesh": {"dp": 2, "cards": 3}, "axes": 7}}   # an unknown flag; a broken group
    assert with_new_flag_names(later, group_by_flag()) == {"flags": {"mesh": {"cards": 3}, "axes": 7}}


def test_flags_stored_in_the_groups_of_an_earlier_version_are_equal():
    """Of the recorded run, and of every flag in another group than its own."""
    config = json.loads((FIXTURE / "run" / "config.json").read_text())
    want = flags_to_dict(make_train_flags(
        model="test", data="text", vocab=330, seq=64, micro_batch=2, global_batch=8, dp=2, pp=2,
        schedule="interleaved", virtual_stages=2, grad_sync="buckets", emulate_link=["dp=1e-6,1e10"],
        lr=0.02, warmup=2, save_every=40, keep_checkpoints=1, eval_every=40, threads=1, out="run", steps=80,
        freeze=[]))
    assert config["flags"].keys() == {"model", "data", "mesh", "pipeline", "optimizer", "run"}
    assert with_new_flag_names(config, group_by_flag())["flags"] == want
    together = {"mesh": {name: value for flags in want.values() for name, value in flags.items()}}
    assert with_new_flag_names({"flags": together}, group_by_flag())["flags"] == want
    assert with_new_flag_names({"flags": want}, group_by_flag())["flags"] == want


def test_a_resumed_run_reports_what_has_changed_under_new_names():
    stored = flags_to_dict(TrainFlags())
    stored["run"]["seconds"] = 60.0
    del stored["run"]["max_seconds"]
    state = with_new_flag_names({"flags": stored}, group_by_flag())
    assert describe_changed_flags(state, make_train_flags(steps=5), 1, 8) == [
        "--steps 5 (100 before)", "--max-seconds not given (60.0 before)"]
