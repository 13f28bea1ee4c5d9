"""What a run says of its data, and what it refuses before it reads any."""
import re
from types import SimpleNamespace

import pytest
import tyro

from nanoinfra.cli import main
from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.describe_data import data_warnings, describe_data
from nanoinfra.data.token_datasets import PackedDataset
from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.train import open_model_and_data
from nanoinfra.train.config import TrainFlags, check_train_flags

BYTES = BPETokenizer.train(["a"], 257)


@pytest.fixture
def mixed(tmp_path):
    """30 files of 100 bytes in UTF-8, one of them held out, and 30 in latin-1."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in (3, *range(92, 121)):           # of these names 3.txt alone is held out
        (folder / f"{i}.txt").write_text("x" * 99 + "\n")
        (folder / f"l{i}.txt").write_bytes(b"caf\xe9")
    return folder


def packed(folder, tokens):
    return PackedDataset(range(tokens), [1], load_corpus(folder), BYTES)


def parse(*argv):
    return tyro.cli(TrainFlags, args=list(map(str, argv)))


def test_what_is_read_and_what_it_makes(mixed):
    assert describe_data(packed(mixed, 3031), seq_len=100) == (
        f"--data {mixed}: 29 documents (2.9 kB) to train on, 1 (100 bytes) held out; "
        "3,031 tokens make 30 samples of 100, the last 30 are in none")
    assert describe_data(packed(mixed, 3001), seq_len=100).endswith("make 30 samples of 100")


def test_what_is_left_out_is_told_by_reason_with_an_example(mixed):
    (mixed / "picture").write_bytes(b"\0")
    (mixed / "loop").symlink_to(mixed)
    (mixed / ".git").mkdir()
    assert data_warnings(packed(mixed, 99), seq_len=8, vocab_size=None, global_batch=8) == [
        f"--data {mixed}: 30 files are read, 33 are left out: 30 not UTF-8 text (e.g. 'l100.txt'); "
        "1 a hidden folder (e.g. '.git'); 1 a link to a folder above it (e.g. 'loop'); "
        "1 binary, not text (e.g. 'picture'); iconv turns other encodings into UTF-8"]


@pytest.mark.parametrize("tokens, vocab, batch, says", [
    (99, 300, 8, "the vocabulary has 257 entries of the 300 wanted"),
    (64, None, 8, "a step takes 8 samples and --data .* has 7 of 8 tokens: some come more than once")])
def test_what_may_not_be_meant_is_told(tmp_path, tokens, vocab, batch, says):
    for name in "ab":
        (tmp_path / name).write_text("x")
    warning, = data_warnings(packed(tmp_path, tokens), 8, vocab, batch)
    assert re.match(says, warning)


def test_a_held_out_side_larger_than_the_other_is_told(tmp_path):
    (tmp_path / "3.txt").write_text("x" * 5_000_000)
    (tmp_path / "92.txt").write_text("x" * 1000)
    warning, = data_warnings(packed(tmp_path, 99), 8, None, 8)
    assert f"--data {tmp_path} holds out 5.0 MB, more than the 1.0 kB to train on" in warning


def test_one_rank_says_it(mixed, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(mixed.parent / "cache"))
    flags = parse("--model", "test", "--data", mixed, "--seq", "8")
    source = open_model_and_data.open_run_inputs(flags, Mesh()).dataset
    said = capsys.readouterr()
    assert said.out.count(f"--data {mixed}: 29 documents") == said.out.count("\n") == 1
    assert said.err.count(f"nanoinfra: --data {mixed}: 30 files are read, 30 are left out: 30 not UTF-8 text"
                          ) == said.err.count("\n") == 1
    open_model_and_data._say(flags, SimpleNamespace(rank=1, data=SimpleNamespace(size=2)), source, 8)
    assert capsys.readouterr() == ("", "")


def test_ranks_that_read_other_files_are_refused(mixed, monkeypatch):
    hashes = [["a" * 64, "t"], ["a" * 64, "t"], ["b" * 64, "t"]]
    monkeypatch.setattr(comm, "all_gather_json", lambda mine, axis, tag: hashes)
    with pytest.raises(ValueError, match="rank 2 has read another --data .*mixed than rank 0: corpus b{12}, "
                                         "not a{12}; its files must be the same on every host"):
        open_model_and_data._check_same(SimpleNamespace(world=None), packed(mixed, 9))


@pytest.mark.parametrize("argv, says", [
    (["--data", "random", "--eval-every", "5"], "--eval-every 5 scores text that is held out, and --data "
                                                "random has none; leave it out, or give --data stdlib"),
    (["--data", "{tmp}", "--out", "{tmp}/runs/x"], "lies in --data {tmp}, so the run would read what it"),
    (["--data", "{tmp}/link", "--out", "{tmp}"], "lies in --data {tmp}/link"),
    (["--data", "{tmp}"], "cannot be written (Not a directory); make room there, or set XDG_CACHE_HOME")])
def test_what_is_refused_before_ranks_start(tmp_path, monkeypatch, capsys, argv, says):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    argv = [part.format(tmp=tmp_path) for part in ["train", "--dp", "2", *argv]]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("nanoinfra: ") and said.count("\n") == 1 and says.format(tmp=tmp_path) in said


@pytest.mark.parametrize("data, out", [("texts", "runs"), ("texts", "texts-2"), (".", ".runs/x")])
def test_a_run_beside_its_data_is_well(tmp_path, monkeypatch, data, out):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / data).mkdir(exist_ok=True)
    check_train_flags(parse("--data", tmp_path / data, "--out", tmp_path / out), 1)
    check_train_flags(parse("--data", "x" * 300), 1)     # the one who reads it says that it is not there
