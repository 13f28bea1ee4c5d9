import codecs
import hashlib
import os
import random
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.data.corpus import load_corpus, split_text
from nanoinfra.data.read_text_files import summarize_skip_reasons

TESTS = "test", "tests", "idle_test"


def held_by(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20 == 0


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_stdlib():
    got = load_corpus("stdlib")
    paths = {d.path for d in got.train} | {d.path for d in got.held_out}
    assert {"argparse.py", "json/decoder.py"} <= paths
    folders = {part for path in paths for part in path.split("/")[:-1]}
    assert not folders & {"site-packages", *TESTS}
    assert all(held_by(d.path) for d in got.held_out) and not any(held_by(d.path) for d in got.train)
    home, out = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", *TESTS}
    there = {path.relative_to(home) for path in home.rglob("*.py")}
    want = {path.as_posix() for path in there if not out & set(path.parts[:-1])}
    assert paths <= want and len(want - paths) == len(got.skipped)
    assert len(got.sha256) == 64 and load_corpus("stdlib").sha256 == got.sha256


def test_a_folder_is_split_by_path(folder, corpus):
    want = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.py")}
    got = {d.path: d.text.encode() for d in (*corpus.train, *corpus.held_out)}
    assert got == want
    assert {d.path for d in corpus.held_out} == {path for path in want if held_by(path)} != set()
    assert sum(corpus.train_and_held_out_bytes) == sum(map(len, want.values()))
    assert corpus.skipped == ()


def test_another_file_moves_no_other(tmp_path):
    write(tmp_path, {f"{i}.txt": b"x%d" % i for i in range(100)})
    before = load_corpus(tmp_path)
    write(tmp_path, {"0 first.txt": b"new", "zz/last.txt": b"new"})
    after = load_corpus(tmp_path)
    assert set(before.train) <= set(after.train) and set(before.held_out) <= set(after.held_out)


def test_a_file_is_split_by_content_wherever_it_stands(tmp_path):
    pieces = [f"{i} ".ljust(9000, "y") + "\n\n" for i in range(80)]
    (tmp_path / "a.txt").write_text("".join(pieces))
    random.Random(0).shuffle(pieces)
    (tmp_path / "b.txt").write_text("".join(pieces))
    a, b = load_corpus(tmp_path / "a.txt"), load_corpus(tmp_path / "b.txt")
    want = {piece for piece in pieces if held_by(piece)}
    assert {d.text for d in a.held_out} == {d.text for d in b.held_out} == want != set()
    assert [d.path for d in a.train] != [d.path for d in b.train]
    assert len(a.train) + len(a.held_out) == 80


@settings(deadline=None, max_examples=50)
@given(st.text("ab\n ", max_size=400), st.integers(1, 20))
def test_pieces_join_to_the_text(text, size):
    got = list(split_text(text, size))
    assert "".join(got) == text
    assert all(0 < len(piece) <= 4 * size for piece in got)


def test_pieces_end_at_blank_lines_then_at_lines_then_anywhere():
    assert list(split_text("aaaaa\n\nbbbbb\n \ncc", 4)) == ["aaaaa\n\n", "bbbbb\n \n", "cc"]
    assert list(split_text("aaaa\naaaa\nbb", 4)) == ["aaaa\naaaa\n", "bb"]
    assert list(split_text("a" * 20, 4)) == ["a" * 8, "a" * 8, "a" * 4]


def test_a_small_corpus_holds_out_the_lowest_hash(tmp_path):
    names = [name for name in "abcdefgh" if not held_by(name)][:3]
    got = load_corpus(write(tmp_path, {name: b"text " + name.encode() for name in names}))
    want = min(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert [d.path for d in got.held_out] == [want] and len(got.train) == 2


def test_what_is_held_out_has_text(tmp_path):
    held = next(f"{i}" for i in range(1000) if held_by(f"{i}"))
    got = load_corpus(write(tmp_path, {held: b"", "x.txt": b"some", "y.txt": b"more"}))
    assert min(got.train_and_held_out_bytes) > 0


def test_the_hash_names_path_text_and_side(tmp_path):
    got = [load_corpus(write(tmp_path / f"{k}", files)).sha256 for k, files in enumerate((
        {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3"}, {"a": b"1", "c": b"2"}))]
    assert got[0] == got[1] and len(set(got)) == 3


def test_what_is_not_text_is_skipped_and_named(tmp_path):
    write(tmp_path, {"a.txt": b"one", "b.txt": b"two", ".git/config": b"hidden", "latin.txt": b"caf\xe9",
                     "picture.gif": b"GIF\0"})
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    got = load_corpus(tmp_path)
    assert {d.path for d in (*got.train, *got.held_out)} == {"a.txt", "b.txt"}
    assert sorted(got.skipped) == [
        (".git", "a hidden folder"), ("gone.txt", "No such file or directory"),
        ("latin.txt", "not UTF-8 text"), ("picture.gif", "binary, not text"), ("pipe", "not a regular file")]


def names(corpus):
    return {d.path for d in (*corpus.train, *corpus.held_out)}


def test_links_are_followed_and_no_file_is_read_twice(tmp_path):
    write(tmp_path, {"texts/a.txt": b"one", "texts/deep/b.txt": b"two", "else/c.txt": b"three",
                     "else/in/d.txt": b"four", "else/in/.hidden/e.txt": b"five", "far/f.txt": b"six"})
    for link, target in (("texts/else", "else"), ("texts/twice", "else"), ("texts/inner", "else/in"),
                         ("texts/again.txt", "texts/a.txt"), ("texts/deep/same.txt", "else/c.txt"),
                         ("texts/f.txt", "far/f.txt"), ("texts/g.txt", "far/f.txt"),
                         ("texts/loop", "texts"), ("texts/deep/up", "."), ("else/in/back", "else"),
                         ("else/home", "texts"), ("texts/.far", "far")):
        (tmp_path / link).symlink_to(tmp_path / target)
    got = load_corpus(tmp_path / "texts")
    assert names(got) == {"a.txt", "deep/b.txt", "else/c.txt", "else/in/d.txt", "f.txt"}
    already, above = "a link to what is read already", "a link to a folder above it"
    assert dict(got.skipped) == {
        "twice": already, "inner": already, "again.txt": already, "deep/same.txt": already, "g.txt": already,
        "else/home": already, "loop": above, "deep/up": above, "else/in/back": above,
        ".far": "a hidden folder", "else/in/.hidden": "a hidden folder"}


def test_names_that_are_no_text_are_told(tmp_path):
    write(tmp_path, {"a.txt": b"one", "b.txt": b"two"})
    with open(os.fsencode(tmp_path) + b"/caf\xe9\n.txt", "wb") as file:
        file.write(b"\xe9")
    skipped = load_corpus(tmp_path).skipped
    assert summarize_skip_reasons(skipped) == r"1 not UTF-8 text (e.g. 'caf\udce9\n.txt')"


@pytest.mark.parametrize("content, want", [
    (b"\xef\xbb\xbfcaf\xc3\xa9", "café"), (b"\xef\xbb\xbf", ""),
    (codecs.BOM_UTF16_LE + b"a\0", "UTF-16, not UTF-8 text"),
    (codecs.BOM_UTF16_BE + b"\0a", "UTF-16, not UTF-8 text"),
    ("café".encode("utf-16-be"), "not UTF-8 text"), ("plain".encode("utf-16-le"), "binary, not text")])
def test_a_byte_order_mark_is_no_text(tmp_path, content, want):
    corpus = load_corpus(write(tmp_path, {"a.txt": content, "b.txt": b"one", "c.txt": b"two"}))
    assert {d.path: d.text for d in (*corpus.train, *corpus.held_out)} | dict(corpus.skipped) == {
        "a.txt": want, "b.txt": "one", "c.txt": "two"}


def test_an_inner_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"one", "b.txt": b"two", "closed/c.txt": b"three"})
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert load_corpus(tmp_path).skipped == ((f"{tmp_path}/closed", "Permission denied"),)


@pytest.mark.parametrize("files, match", [
    ({}, "corpus .* is empty; "),
    ({"a.txt": b"", "b.txt": b""}, "corpus .* is empty; "),
    ({"a.bin": b"\0"}, r"is empty \(left out: 1 binary, not text \(e.g. 'a.bin'\)\)"),
    ({"a.txt": b"alone"}, "no held-out documents: its 5 bytes .* folder of two files"),
])
def test_a_folder_with_too_little(tmp_path, files, match):
    with pytest.raises(ValueError, match=match):
        load_corpus(write(tmp_path, files))


@pytest.mark.parametrize("content, match", [
    (b"", "corpus .* is empty; "),
    (b"short", "no held-out documents: its 5 bytes .* above 16384 bytes"),
    (b"a" * 65536, "no held-out documents: its 65536 bytes make one document or equal ones"),
    (b"caf\xe9" * 9999, "cannot read --data .*file.txt: not UTF-8 text"),
])
def test_a_file_with_too_little(tmp_path, content, match):
    (tmp_path / "file.txt").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        load_corpus(tmp_path / "file.txt")


def test_a_path_that_cannot_be_read(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "nowhere", "No such file"), (tmp_path / "loop", "Too many levels"),
                         (tmp_path / "pipe", "not a regular file"), ("x" * 300, "File name too long")):
        with pytest.raises(ValueError, match=f"cannot read --data .*: {reason}.*; give stdlib, random, or"):
            load_corpus(path)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", closed)
    with pytest.raises(ValueError, match="cannot read --data .*: Permission denied; give"):
        load_corpus(tmp_path)
