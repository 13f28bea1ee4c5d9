import shutil
import sys
from pathlib import Path

import pytest

import lessons  # this repository's, before a test brings its own

LESSONS = Path(lessons.__file__).parent


@pytest.fixture
def course(tmp_path, monkeypatch):
    """An empty course folder, in which a student's work/ will be made; the current folder."""
    (tmp_path / "lessons").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.fixture
def bring(course):
    """`bring(lesson)` copies a lesson's folder into the empty course."""
    def copy(lesson):
        shutil.copy(LESSONS / "__init__.py", course / "lessons")
        return shutil.copytree(LESSONS / lesson, course / "lessons" / lesson,
                               ignore=shutil.ignore_patterns("__pycache__"))
    return copy
