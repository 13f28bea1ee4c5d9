import json
import shutil
from pathlib import Path

import pytest

from nanoinfra.lab import exercise
from nanoinfra.lab.build import clear, convert
from nanoinfra.lab.grade import main

LESSONS = Path(__file__).parents[2] / "lessons"
SOURCES = {path.name[:2]: path for path in sorted(LESSONS.glob("[0-9][0-9]_*.py"))}


@pytest.fixture(params=SOURCES)
def number(request, course):
    """Each lesson, copied into an otherwise empty course."""
    shutil.copy(SOURCES[request.param], course / "lessons")
    return request.param


def exported(notebook, folder):
    import nbformat
    nbformat.write(notebook, folder / "x.ipynb")
    (file,) = exercise.extract(folder / "x.ipynb", folder)
    return file


def predict_all(number, folder):
    from nanoinfra.lab.check import lesson
    made = {key: {"unit": "", "predicted": [1.0]} for key in lesson(number).PREDICTIONS}
    (folder / "numbers.json").write_text(json.dumps(made))


def test_the_empty_starter_scores_nothing(number, course, capsys):
    (course / "work").mkdir()
    exported(clear(convert(SOURCES[number])), course / "work")
    assert main([number]) == 1
    out = capsys.readouterr().out
    assert "score 0 of" in out and "not written yet" in out and "not made" in out


def test_the_reference_scores_full_once_it_is_somebodys_work(number, course, capsys):
    (course / "work").mkdir()
    file = exported(convert(SOURCES[number]), course / "work")
    predict_all(number, course / "work")
    assert main([number]) == 2
    assert "is the reference" in capsys.readouterr().err
    file.write_text("\n".join(line for line in file.read_text().splitlines() if "SOLUTION" not in line))
    assert main([number]) == 0
    points, most = capsys.readouterr().out.rpartition("score ")[2].split(" of ")
    assert int(points) == int(most) > 2
    (course / "work" / "numbers.json").unlink()
    assert main([number, "--file", str(file)]) == 1                # a prediction is graded for being made


@pytest.mark.prove                                               # the reference's score is in the test above
def test_the_lesson_itself_can_be_passed(number, capsys):
    assert main([number, "--reference"]) == 0
    assert "score" in capsys.readouterr().out


def test_what_cannot_be_graded_is_said_in_one_line(course, capsys):
    assert main(["02"]) == 2
    assert main(["98"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "work/L02.py does not exist" in lines[0] and "'98' has no checks" in lines[1]


def test_a_file_that_does_not_run_scores_nothing_and_says_where(course, capsys):
    (course / "work").mkdir()
    (course / "work" / "L02.py").write_text("def ring_all_reduce(x, axis:\n    return x\n")
    assert main(["02"]) == 1
    out = capsys.readouterr().out
    assert "score 0 of" in out and "SyntaxError" in out and "L02.py, line 1" in out
