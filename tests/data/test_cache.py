import pytest

from nanoinfra.data.cache import FORMAT, cached_folder


def entries(cache):
    return sorted(path.name for path in (cache / FORMAT).iterdir())


def test_an_entry_is_made_once(tmp_path):
    made = []

    def fill(folder):
        made.append(folder)
        (folder / "a").write_text("whole")

    first, second = cached_folder("x", fill, tmp_path), cached_folder("x", fill, tmp_path)
    assert first == second and (first / "a").read_text() == "whole"
    assert len(made) == 1 and entries(tmp_path) == ["x"]


def test_the_loser_of_a_race_takes_the_winners_entry(tmp_path):
    def fill(folder):
        (folder / "a").write_text("loser")
        cached_folder("x", lambda winner: (winner / "a").write_text("winner"), tmp_path)

    got = cached_folder("x", fill, tmp_path)
    assert (got / "a").read_text() == "winner"
    assert entries(tmp_path) == ["x"]


def test_a_failure_half_way_leaves_no_entry(tmp_path):
    def fill(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("x", fill, tmp_path)
    assert entries(tmp_path) == []


def test_the_default_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_folder("x", lambda folder: None) == tmp_path / ".cache" / "nanoinfra" / FORMAT / "x"


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache .*file.* cannot be written .*Not a directory.*; make room"):
        cached_folder("x", lambda folder: None, tmp_path / "file")


def test_a_full_disk_is_a_clear_error(tmp_path):
    def fill(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="No space left on device"):
        cached_folder("x", fill, tmp_path)
    assert entries(tmp_path) == []
