"""Old flags are answered with their new names, and new names are flags that exist."""
import pytest

from nanoinfra.cli import main
from nanoinfra.commands import _flag_names, _kinds
from nanoinfra.renamed_flags import RENAMED_FLAGS, check_no_renamed_flags, with_new_flag_names
from nanoinfra.train.config import RunFlags, TrainFlags, flags_to_dict
from nanoinfra.train.run_directory.resume_check import describe_changed_flags

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
    assert with_new_flag_names(stored) == {"step": 3, "flags": {
        "mesh": {"emulate_link": [], "dp": 2}, "run": {"keep_checkpoints": 1, "max_seconds": None}}}
    assert with_new_flag_names({"step": 3}) == {"step": 3}
    assert with_new_flag_names({"flags": {"mesh": 7}}) == {"flags": {"mesh": 7}}


def test_a_resumed_run_reports_what_has_changed_under_new_names():
    stored = flags_to_dict(TrainFlags())
    stored["run"]["seconds"] = 60.0
    del stored["run"]["max_seconds"]
    state = with_new_flag_names({"flags": stored})
    assert describe_changed_flags(state, TrainFlags(run=RunFlags(steps=5)), 1, 8) == [
        "--steps 5 (100 before)", "--max-seconds not given (60.0 before)"]
