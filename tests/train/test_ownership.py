"""What is not a run's is not overwritten, and a run of another version is told from a bad one."""
import json
import re
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.config import MODEL_SIZES
from nanoinfra.train.config import RunFlags
from nanoinfra.train.run_directory.check_out_folder import check_out_folder, read_model_config
from tests.train.runs import FLAGS

MANIFEST = '{\n "format": "nanoinfra checkpoint 1",\n'
MINE = json.dumps({"nanoinfra": 1, "model": MODEL_SIZES["test"].config.to_dict()})


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ANOTHERS = {
    "a Hugging Face folder": ({"config.json": '{"model_type": "llama"}', "model.safetensors": "weights",
                               "tokenizer.json": "{}"}, "holds config.json, which"),
    "a tokenizer": ({"tokenizer/tokenizer.json": "{}"}, "holds tokenizer, which"),
    "someone's metrics": ({"metrics.jsonl": '{"epoch": 1}\n'}, "holds metrics.jsonl, which"),
    "someone's picture": ({"loss.png": "PNG"}, "holds loss.png, which"),
    "someone's checkpoints": ({"checkpoints/step_00000100/pytorch_model.bin": "weights"},
                              "holds checkpoints, which"),
    "a config.json that is broken": ({"config.json": "{"}, "holds config.json, which"),
    "files where folders belong": ({"checkpoints": ""}, "holds a file checkpoints"),
    "folders where files belong": ({"metrics.jsonl/note": ""}, "holds a folder metrics.jsonl"),
    "another version's run": ({"config.json": '{"nanoinfra": 2}'},
                              "its format is 2, and this version reads 1"),
}


@pytest.mark.parametrize("files, says", ANOTHERS.values(), ids=ANOTHERS.keys())
def test_a_folder_that_is_not_a_runs_is_refused_and_left_as_it_is(tmp_path, capsys, files, says):
    want = content(fill(tmp_path, files))
    for more in ([], ["--dp", "2"], ["--resume"]):
        assert main([*FLAGS, "--out", str(tmp_path), *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and says in said and "remove" not in said, said
    assert content(tmp_path) == want


@pytest.mark.parametrize("files", [
    {}, {"notes.txt": "mine"}, {"config.json": MINE, "metrics.jsonl": "", "tokenizer/vocab": "x"},
    {"config.json": "{", "checkpoints/step_00000001/manifest.json": MANIFEST}])
def test_a_new_folder_a_runs_and_what_does_not_collide_are_taken(tmp_path, files):
    (fill(tmp_path, files) / "checkpoints").mkdir(exist_ok=True)
    check_out_folder(RunFlags(out=tmp_path))


@pytest.mark.parametrize("out, says", [
    ("/", "the whole file system"), ("{run}/checkpoints", "give --out {run}"),
    ("{run}/checkpoints/step_00000001", "give --out {run}"), ("{run}/tokenizer", "give --out {run}")])
def test_a_part_of_a_run_or_of_everything_is_no_place_for_one(tmp_path, out, says):
    fill(tmp_path, {"config.json": MINE, "checkpoints/step_00000001/manifest.json": MANIFEST})
    with pytest.raises(ValueError, match=re.escape(says.format(run=tmp_path))):
        check_out_folder(RunFlags(out=Path(out.format(run=tmp_path))))


def test_a_linked_tokenizer_is_not_written_through(tmp_path):
    fill(tmp_path, {"run/config.json": MINE, "theirs/tokenizer.json": "{}"})
    (tmp_path / "run" / "tokenizer").symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match="tokenizer is a link"):
        check_out_folder(RunFlags(out=tmp_path / "run"))


def test_nothing_is_made_where_there_is_nothing_to_resume(tmp_path, capsys):
    assert main([*FLAGS, "--resume", "--out", str(tmp_path / "typo")]) == 2
    assert "there is no " in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trace, says", [
    ("letter.txt", "is a file already, and no timeline"), ("run/metrics.jsonl", "the run itself writes to"),
    ("run/checkpoints/t.json", "the run itself writes to"), ("nowhere/t.json", "make it first"),
    ("run", "is a folder")])
def test_a_trace_overwrites_only_a_trace(tmp_path, trace, says):
    fill(tmp_path, {"letter.txt": "Dear Sir", "run/config.json": MINE, "old.json": '{"traceEvents": []}'})
    with pytest.raises(ValueError, match=says):
        check_out_folder(RunFlags(out=tmp_path / "run", trace=tmp_path / trace))
    for good in ("old.json", "new.json", "new/trace.json"):
        check_out_folder(RunFlags(out=tmp_path / "new", trace=tmp_path / good))


@pytest.mark.parametrize("config, says", [
    ({"nanoinfra": 1, "model": {**json.loads(MINE)["model"], "sinks": 4}}, "describes a model by sinks, "),
    ({"nanoinfra": 2, "model": {}}, "its format is 2, and this version reads 1"),
    ({"nanoinfra": 1}, "says nothing of the model"),
    ({"nanoinfra": 1, "model": {"vocab": 1}}, "a whole model")])
def test_a_model_that_this_version_does_not_know_is_one_line(tmp_path, capsys, config, says):
    fill(tmp_path, {"config.json": json.dumps(config)})
    with pytest.raises(ValueError, match=says):
        read_model_config(tmp_path)
    assert main(["generate", str(tmp_path), "x"]) == 2
    assert says in capsys.readouterr().err
