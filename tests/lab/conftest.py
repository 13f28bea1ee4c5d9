import pytest


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An empty course folder, in which a student's work/ will be made; the current folder."""
    (tmp_path / "lessons").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
