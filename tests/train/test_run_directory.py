"""A run goes on as what it was: what has changed is said, what is broken or spoilt is left behind."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoinfra.cli import main
from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.train import metrics_and_plots, trainer
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.config import ModelFlags, RunFlags, TrainFlags
from nanoinfra.train.optimizer import MixedPrecisionOptimizer
from nanoinfra.train.run_directory.check_resume_and_report_changes import check_resumes_same_run
from nanoinfra.train.run_directory.run_directory import RunDirectory
from tests.train.runs import bits

ARGV = ["train", "--model", "test", "--data", "text", "--vocab", "260", "--dtype", "float64", "--seq", "8",
        "--micro-batch", "2", "--threads", "1", "--warmup", "0", "--steps", "3", "--keep-checkpoints", "9",
        "--out", "run"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of three steps, each saved, and the text it was trained on."""
    folder = tmp_path_factory.mktemp("made")
    for name in "abc":
        (folder / "text" / name).parent.mkdir(exist_ok=True)
        (folder / "text" / name).write_text(f"{name} few words and a few more\n" * 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_and_plots, "plot_loss_curve", lambda *_: None)
        patch.chdir(folder)
        assert main([*ARGV, "--save-every", "1"]) == 0
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of it that a test may spoil; its picture is not drawn."""
    monkeypatch.setattr(metrics_and_plots, "plot_loss_curve", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return Path("run")


def resume(*more):
    return main([*ARGV, "--resume", *more])


def lines(run):
    return metrics_and_plots.read_metrics(run / "metrics.jsonl")


def saved(run):
    return [path.name for path in save_and_load.list_checkpoints(run / "checkpoints")]


def test_a_run_without_a_checkpoint_is_not_wiped(run, capsys):
    shutil.rmtree(run / "checkpoints")
    want = (run / "metrics.jsonl").read_bytes()
    assert main(ARGV) == 2
    assert "the metrics of 3 steps of a run that has no checkpoint" in capsys.readouterr().err
    assert resume() == 2 and "train anew into another --out" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == want


CHANGED = {
    "the text": ([], "of 3 documents, 729 bytes, and now there is --data text of 3 documents, 730 bytes; put "
                     "the text back as it was, or train the new text into its weights as a run of its own: "
                     "--model run --out another"),
    "as much text": ([], "and now there is as much in --data text, but not the same text; put the text back"),
    "which text": (["--data", "random"], "trained on --data text of 3 documents, 729 bytes, and now there is "
                                         "--data random; give --data text, or train"),
    "the seed": (["--seed", "1"], "has seed 0, this one 1; give --seed 0"),
    "the sequence": (["--seq", "7"], "has seq 8, this one 7; give --seq 8"),
    "the vocabulary": (["--vocab", "258"], "a vocabulary of 260, this one of 258; give --model test --vocab"),
    "the size": (["--model", "nano"], "trains --model test, this is --model nano; give --model test"),
    "the head": (["--untied"], "has tied True (here False); give --model test --vocab 260\n"),
    "the optimizer": (["--optimizer", "sgd"], "the state of --optimizer adamw, which sgd cannot use; give"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_another_run_is_refused_in_words(run, capsys, what):
    more, says = CHANGED[what]
    text, added = Path("text"), {"the text": "aaaaa", "as much text": "bbbb"}.get(what)
    if added:
        (text / "a").write_text(added + (text / "a").read_text()[4:])
    assert resume(*more) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said, said
    assert max(map(len, said.split())) < 40, "a hash"


def test_what_a_checkpoint_of_another_version_lacks_is_named(run):
    with pytest.raises(ValueError, match="says nothing of consumed, .* another version .*--out another"):
        check_resumes_same_run(run, {"step": 3}, None, None, {})


def test_what_a_checkpoint_of_a_later_version_has_is_named(run):
    state = save_and_load.read_checkpoint_state(run / "checkpoints" / "step_00000003")
    state["model"]["sinks"] = 4
    model = ModelConfig(**json.loads((run / "config.json").read_text())["model"])
    flags = TrainFlags(model=ModelFlags("test"))
    with pytest.raises(ValueError, match="has sinks, which this version of nanoinfra does not know"):
        inputs = SimpleNamespace(data_identity=state, model_config=model)
        check_resumes_same_run(run, state, inputs, flags, {})


def test_flags_that_may_change_are_said_with_what_they_do_to_the_rate(run, capsys):
    assert resume("--steps", "4", "--clip", "2", "--lr-schedule", "constant", "--lr", "0.5") == 0
    said, rates = capsys.readouterr().out, [line["lr"] for line in lines(run)]
    assert ("other than before: --lr 0.5 (not given before), --lr-schedule constant (cosine before), --clip "
            "2.0 (1.0 before), --steps 4 (3 before): the learning rate goes from "
            f"{rates[2]:.3g} to 0.5\n") in said, said
    assert rates[3] == 0.5
    assert resume("--steps", "5", "--clip", "2", "--lr-schedule", "constant", "--lr", "0.5",
                  "--global-batch", "3") == 0
    assert "other than before: --steps 5 (4 before), --global-batch 3 (2 before)\n" in capsys.readouterr().out


def test_an_evaluation_before_a_save_leaves_the_rate_in_it(run):
    assert resume("--steps", "4", "--eval-every", "1", "--save-every", "1") == 0
    state = save_and_load.read_checkpoint_state(run / "checkpoints" / "step_00000004")
    assert state["lr"] == lines(run)[3]["lr"] > 0


def test_a_run_that_is_done_says_so(run, capsys):
    assert resume() == 0
    assert "nothing is left to do: the run has had --steps 3 already; give more" in capsys.readouterr().out
    assert len(lines(run)) == 3


class Killed(Exception):
    """What ends a run in the middle of it."""


def test_the_seconds_spent_are_state(run, monkeypatch):
    """Eight steps of a second each, in one part, and in two of which the first is cut off after a save."""
    now, execute = [0.0], trainer.execute_schedule

    def in_a_second(*given):
        now[0] += 1
        return execute(*given)
    monkeypatch.setattr(trainer, "execute_schedule", in_a_second)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    timed = [*ARGV, "--max-seconds", "8", "--save-every", "6"]
    assert main([*timed, "--out", "whole"]) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDirectory, "write_loss_plot", killed)
        main([*timed, "--out", "parts"])
    assert main([*timed, "--out", "parts", "--resume"]) == 0
    want, got = ([line["lr"] for line in lines(Path(out))] for out in ("whole", "parts"))
    assert len(want) == 8 and got == want


def killed(*_):
    raise Killed


def test_going_on_from_an_earlier_step_leaves_later_checkpoints_behind(run, capsys):
    want = bits(lines(run))
    assert resume("--resume-from", "1", "--steps", "2", "--lr-schedule", "constant") == 0
    said = capsys.readouterr().out
    assert "going on after step 1" in said and "step_00000003 is set aside as step_00000003.abandoned" in said
    assert bits(lines(run))[0] == want[0] and len(lines(run)) == 2
    assert saved(run) == ["step_00000001", "step_00000002"]
    assert main([*ARGV, "--resume-from", "1"]) == 0
    assert bits(lines(run)) == want                                        # as if it had never been otherwise
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "step_00000001", "step_00000002.abandoned", "step_00000002.abandoned1", "step_00000003",
        "step_00000003.abandoned"}


def test_a_step_that_was_not_saved_is_answered_with_those_that_were(run, capsys):
    assert resume("--resume-from", "7") == 2
    assert "no checkpoint of it; there are those of steps 1, 2, 3" in capsys.readouterr().err
    (run / "checkpoints" / "step_00000002" / "state.json").write_text("{")
    assert resume("--resume-from", "2") == 2
    said = capsys.readouterr().err
    assert "state.json: is truncated" in said and said.endswith("; there are those of steps 1, 3\n")
    assert saved(run) == ["step_00000001", "step_00000002", "step_00000003"]


def test_ranks_that_start_again_do_not_go_back_once_more(run, monkeypatch):
    """But they do where the attempt before died ere it had left later checkpoints behind."""
    flags = RunFlags(out=run, resume_from=1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    again = RunDirectory(flags, Mesh())
    assert again._chosen(again._is_restart()) == "step_00000001"
    config = json.loads((run / "config.json").read_text())
    config["flags"]["run"]["resume_from"] = 1
    (run / "config.json").write_text(json.dumps(config))
    assert again._chosen(again._is_restart()) == "step_00000003"


def test_weights_that_are_no_numbers_are_not_saved(run, capsys, monkeypatch):
    step = MixedPrecisionOptimizer.step

    def spoils(self, grads, lr):
        step(self, grads, lr)
        if self.num_steps == 5:
            next(iter(self.master_weights.values())).data[0] = math.nan
    monkeypatch.setattr(MixedPrecisionOptimizer, "step", spoils)
    assert resume("--steps", "9", "--save-every", "1") == 2
    said = capsys.readouterr().err
    assert "step 5: its update made weights that are no finite numbers" in said
    assert "step_00000004: go on from there with --resume, or, if that is spoilt already, from an earlier " \
           "one with --resume-from 1 or 2 or 3; try --lr" in said
    assert saved(run)[-1] == "step_00000004"


def test_a_checkpoint_that_is_spoilt_is_told_from_the_one_before_it(run, capsys, monkeypatch):
    load = MixedPrecisionOptimizer.load_state_dict

    def spoilt(self, tensors, steps):
        load(self, tensors, steps)
        next(iter(self.master_weights.values())).data[:] = math.nan
    monkeypatch.setattr(MixedPrecisionOptimizer, "load_state_dict", spoilt)
    assert resume("--steps", "9") == 2
    says = "step_00000003, which is spoilt already; go on from an earlier one with --resume-from 1 or 2; try"
    assert says in capsys.readouterr().err


def test_broken_lines_of_metrics_are_dropped_and_counted(run, capsys):
    path = run / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\n" + second[:40] + b"\n\xff\n[1]\n" + b"[" * 9999 + b"\n" + third)
    assert resume("--steps", "4") == 0
    assert "metrics.jsonl holds 2 of the 3 steps so far; 5 lines that are no step's are dropped" in \
        capsys.readouterr().err
    assert [line["step"] for line in lines(run)] == [1, 3, 4]


@pytest.mark.parametrize("config", ["{", None])
def test_a_broken_config_is_written_anew(run, config):
    want = json.loads((run / "config.json").read_text())
    (run / "config.json").unlink()
    if config:
        (run / "config.json").write_text(config)
    assert resume() == 0
    assert json.loads((run / "config.json").read_text())["model"] == want["model"]


def test_a_picture_that_cannot_be_drawn_ends_nothing(run, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(metrics_and_plots, "plot_loss_curve", refuse)
    assert resume("--steps", "5", "--save-every", "1") == 0
    said = capsys.readouterr().err
    assert said.count("loss.png: Permission denied; the run goes on without it") == 1
