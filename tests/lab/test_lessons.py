import json
import re
from pathlib import Path

import pytest

from nanoinfra.lab.build_notebooks import build_notebooks, convert_to_notebook
from tests.lab.notebook import in_a_kernel, in_this_process

ROOT = Path(__file__).parents[2]
LONG = ("01", "03", "04", "06", "07", "08", "10", "15")  # their ranks or timings take seconds
SOURCES = sorted((ROOT / "lessons").glob("*/lesson.py"))
SECTIONS = ["The wall", "Predict", "Build", "Read the real one", "Measure, compare, explain", "Break it",
            "What came next"]
lessons = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name[1:])


@lessons
def test_a_lesson_has_the_form_of_all_lessons(source):
    text, cells = source.read_text(), convert_to_notebook(source).cells
    assert len(text.splitlines()) <= 350 and len(cells) <= 35
    for said in ("**Needs**", "**Time**", "**Builds on**", "After this you can"):
        assert said in cells[0].source
    found = re.findall(r"^# ## \d\. (.*)$", text, re.MULTILINE)
    assert found == [name for name in SECTIONS if name in found]
    assert set(SECTIONS) - set(found) <= {"Break it"}
    assert f'predict("L{number(source)}.' in text and "compare_predictions(" in text


def number(source):
    return source.parent.name[1:3]


def execute(source, bring, course, monkeypatch, fast, run=in_a_kernel):
    """Run the notebook in an empty course; returns what it wrote to work/numbers.json."""
    monkeypatch.setenv("LESSON_FAST", "1") if fast else monkeypatch.delenv("LESSON_FAST", raising=False)
    bring(source.parent.name)
    (file,) = build_notebooks("lessons")
    run(file)
    return json.loads((course / "work" / "numbers.json").read_text())


@pytest.mark.parametrize("source", [
    pytest.param(path, marks=pytest.mark.prove if number(path) in LONG else ()) for path in SOURCES],
    ids=lambda path: path.parent.name[1:])
def test_it_runs_in_fast_mode_and_what_is_counted_matches(source, bring, course, monkeypatch):
    run = in_a_kernel if number(source) == "00" else in_this_process       # a kernel takes 6 s to start
    _counted_match(execute(source, bring, course, monkeypatch, fast=True, run=run))
    assert (course / "work" / "reference" / f"L{number(source)}.py").is_file()
    assert not (course / "work" / f"L{number(source)}.py").exists()         # never over a student's file


@pytest.mark.prove
@pytest.mark.timeout(3600)
@lessons
def test_it_runs_at_full_size_and_what_is_counted_matches(source, bring, course, monkeypatch):
    _counted_match(execute(source, bring, course, monkeypatch, fast=False))


def _counted_match(numbers):
    assert numbers
    for key, entry in numbers.items():
        if entry["measured"]["kind"] == "counted":
            assert entry["measured"]["value"] == pytest.approx(entry["predicted"][-1], rel=1e-12), key
