import os
import pwd
import shutil
from pathlib import Path

import pytest

from nanoinfra.data import tokenizer_and_token_cache
from nanoinfra.data.tokenizer_and_token_cache import (
    _CACHE_FORMAT,
    CHECKSUMS_FILE,
    CONTENT_FOLDER,
    get_or_build_folder,
    make_cache_folder,
)


def entries(root):
    return sorted(path.name for path in (root / _CACHE_FORMAT).iterdir())


def test_an_entry_is_made_once(tmp_path):
    made = []

    def fill(folder):
        made.append(folder)
        (folder / "a").write_text("whole")

    first, second = get_or_build_folder("x", fill, tmp_path), get_or_build_folder("x", fill, tmp_path)
    assert first == second and (first / "a").read_text() == "whole"
    assert len(made) == 1 and entries(tmp_path) == ["x"]


def test_the_loser_of_a_race_takes_the_winners_entry(tmp_path):
    def fill(folder):
        (folder / "a").write_text("loser")
        get_or_build_folder("x", lambda winner: (winner / "a").write_text("winner"), tmp_path)

    got = get_or_build_folder("x", fill, tmp_path)
    assert (got / "a").read_text() == "winner"
    assert entries(tmp_path) == ["x"]


def test_a_failure_half_way_leaves_no_entry(tmp_path):
    def fill(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_or_build_folder("x", fill, tmp_path)
    assert entries(tmp_path) == []


DAMAGE = {
    "a page of zeros": lambda entry: zero(entry / CONTENT_FOLDER / "a", 4096, 4096),
    "a truncated file": lambda entry: os.truncate(entry / CONTENT_FOLDER / "a", 4096),
    "a longer file": lambda entry: (entry / CONTENT_FOLDER / "a").write_bytes(b"whole" * 4096 + b"x"),
    "a missing file": lambda entry: (entry / CONTENT_FOLDER / "a").unlink(),
    "another file beside it": lambda entry: (entry / CONTENT_FOLDER / "b").write_text("x"),
    "a folder in a file's place": lambda entry: in_its_place(entry / CONTENT_FOLDER / "a", Path.mkdir),
    "a pointer to nowhere": lambda entry: in_its_place(entry / CONTENT_FOLDER / "a",
                                                       lambda a: a.symlink_to("gone")),
    "no list": lambda entry: (entry / CHECKSUMS_FILE).unlink(),
    "a cut list": lambda entry: os.truncate(entry / CHECKSUMS_FILE, 20),
    "a list of zeros": lambda entry: zero(entry / CHECKSUMS_FILE, 0, 60),
    "another kind of list": lambda entry: (entry / CHECKSUMS_FILE).write_text('["a"]'),
    "no text": lambda entry: (entry / CHECKSUMS_FILE).write_bytes(b"\xff"),
    "no content": lambda entry: shutil.rmtree(entry / CONTENT_FOLDER),
    "an empty folder": lambda entry: in_its_place(entry, Path.mkdir),
    "the files of an older version": lambda entry: (shutil.rmtree(entry), entry.mkdir(),
                                                    (entry / "a").write_text("old")),
    "a file": lambda entry: in_its_place(entry, lambda path: path.write_text("x")),
    "a link to nowhere": lambda entry: in_its_place(entry, lambda path: path.symlink_to("gone"))}


def zero(path, start, count):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(count))


def in_its_place(path, make):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_as_it_was_written_is_made_again_and_said_once(tmp_path, capfd, damage):
    def fill(folder):
        (folder / "a").write_bytes(b"whole" * 4096)

    get_or_build_folder("x", fill, tmp_path)
    DAMAGE[damage](tmp_path / _CACHE_FORMAT / "x")
    for _ in range(2):
        assert (get_or_build_folder("x", fill, tmp_path) / "a").read_bytes() == b"whole" * 4096
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"nanoinfra: {tmp_path / _CACHE_FORMAT / 'x'} ")
    assert said[0].endswith("; it is made again") and entries(tmp_path) == ["x"]


def test_an_entry_that_another_has_mended_meanwhile_stays(tmp_path, monkeypatch):
    def fill(folder):
        (folder / "a").write_text("whole")

    get_or_build_folder("x", fill, tmp_path)
    DAMAGE["a file"](tmp_path / _CACHE_FORMAT / "x")
    find, mended = tokenizer_and_token_cache._fault, []

    def slowly(entry):
        fault = find(entry)
        if not mended:                       # as long as this one looks, another makes it
            mended.append(True)
            mended.append(get_or_build_folder("x", fill, tmp_path).stat().st_ino)
        return fault

    monkeypatch.setattr(tokenizer_and_token_cache, "_fault", slowly)
    got = get_or_build_folder("x", lambda folder: (folder / "a").write_text("mine"), tmp_path)
    assert got.stat().st_ino == mended[1] and (got / "a").read_text() == "whole"


def test_a_good_entry_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    get_or_build_folder("x", lambda folder: (folder / "a").write_text("whole"), tmp_path)
    monkeypatch.setattr(tokenizer_and_token_cache, "TemporaryDirectory", None)
    monkeypatch.setattr(Path, "mkdir", None)
    assert (get_or_build_folder("x", None, tmp_path) / "a").read_text() == "whole"


def test_a_damaged_entry_where_nothing_can_be_written_is_a_clear_error(tmp_path, monkeypatch):
    entry = get_or_build_folder("x", lambda folder: (folder / "a").write_text("whole"), tmp_path).parent
    in_its_place(entry, lambda path: path.write_text("x"))

    def closed(dir):
        raise OSError(30, "Read-only file system", dir)

    monkeypatch.setattr(tokenizer_and_token_cache, "TemporaryDirectory", closed)
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\); .*XDG_CACHE_HOME"):
        get_or_build_folder("x", None, tmp_path)


@pytest.mark.parametrize("xdg, want", [
    (None, "home/.cache"), ("", "home/.cache"), ("relative", "home/.cache"), ("{tmp}/xdg", "xdg")])
def test_the_default_is_the_users_cache(tmp_path, monkeypatch, xdg, want):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg.format(tmp=tmp_path))
    got = get_or_build_folder("x", lambda folder: None)
    assert got == tmp_path / want / "nanoinfra" / _CACHE_FORMAT / "x" / CONTENT_FOLDER and got.is_dir()
    make_cache_folder()


def test_a_user_without_a_home_is_told_which_variable_helps(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])    # as the system does for an unknown one
    for look in (lambda: get_or_build_folder("x", None), make_cache_folder):
        with pytest.raises(ValueError, match="no home folder .*; set XDG_CACHE_HOME or HOME to a folder"):
            look()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert get_or_build_folder("x", lambda folder: None).is_relative_to(tmp_path)


def test_a_cache_that_cannot_be_made_is_refused_before_it_is_wanted(tmp_path, monkeypatch):
    def closed(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "mkdir", closed)                     # root may everything
    with pytest.raises(ValueError, match=r"cannot be written \(Permission denied\); .* set XDG_CACHE_HOME"):
        make_cache_folder()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make_cache_folder()
    monkeypatch.setattr(os, "mkdir", closed)
    make_cache_folder()                                                # what is wanted may be in it


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache .*file.* cannot be written .*Not a directory.*; make room"):
        get_or_build_folder("x", lambda folder: None, tmp_path / "file")


def test_a_full_disk_is_a_clear_error(tmp_path):
    def fill(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device"):
        get_or_build_folder("x", fill, tmp_path)
    assert entries(tmp_path) == []
