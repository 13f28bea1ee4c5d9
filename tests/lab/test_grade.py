import json
import sys
from pathlib import Path

import pytest

from nanoinfra.lab import exercise
from nanoinfra.lab.build_notebooks import clear_solutions, convert_to_notebook
from nanoinfra.lab.check import Check, load_lesson_checks
from nanoinfra.lab.find_course_folder import display_path
from nanoinfra.lab.grading import grade_lesson, judge_process
from nanoinfra.lab.grading.grade_lesson import main
from nanoinfra.lab.grading.limited_process import ProcessLimits
from tests.lab.judging import BEGIN, PASS

LESSONS = Path(__file__).parents[2] / "lessons"
SOURCES = {path.parent.name[1:3]: path for path in sorted(LESSONS.glob("*/lesson.py"))}
LONG = ("03", "06", "08", "10")              # their ranks take seconds; `make prove` grades them too


@pytest.fixture(params=[pytest.param(number, marks=pytest.mark.prove if number in LONG else ())
                        for number in SOURCES])
def number(request, bring):
    """Each lesson, copied into an otherwise empty course."""
    bring(SOURCES[request.param].parent.name)
    return request.param


@pytest.fixture
def here(monkeypatch):
    """A hand-in is judged in this process, whose ranks are warm: `make prove` has one of its own for each."""
    def judged(lesson, file, checks, limits):
        found = {each.name: [] for each in checks}
        for name, verdict in judge_process.judge_file(checks, str(file), display_path(file)):
            found[name].append(verdict)
        return [each.report_of_verdicts(found[each.name], display_path(file)) for each in checks]
    monkeypatch.setattr(grade_lesson, "judge_in_subprocess", judged)


def exported(notebook, folder):
    import nbformat
    nbformat.write(notebook, folder / "x.ipynb")
    (file,) = exercise.export_exercises_of_notebook(folder / "x.ipynb", folder)
    return file


def predict_all(number, folder):
    made = {key: {"unit": "", "predicted": [1.0]} for key in load_lesson_checks(number).PREDICTIONS}
    (folder / "numbers.json").write_text(json.dumps(made))


def handed_in(course, number, text):
    (course / "work").mkdir(exist_ok=True)
    (course / "work" / f"L{number}.py").write_text(text)


def test_the_empty_starter_scores_nothing(number, course, here, capsys):
    (course / "work").mkdir()
    exported(clear_solutions(convert_to_notebook(SOURCES[number])), course / "work")
    assert main([number]) == 1
    out = capsys.readouterr().out
    assert "score 0 of" in out and "not written yet" in out and "not made" in out


def test_the_reference_scores_full_once_it_is_somebodys_work(number, course, here, capsys):
    (course / "work").mkdir()
    file = exported(convert_to_notebook(SOURCES[number]), course / "work")
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


def test_a_file_that_does_not_run_scores_nothing_and_says_where(course, here, capsys):
    handed_in(course, "02", "def ring_all_reduce(x, axis:\n    return x\n")
    assert main(["02"]) == 1
    out = capsys.readouterr().out
    assert "score 0 of" in out and "SyntaxError" in out and "L02.py, line 1" in out


def test_what_is_too_large_or_no_record_is_not_graded(course, capsys):
    handed_in(course, "04", "#" * (1 << 20) + "\n")
    assert main(["04"]) == 2
    assert "1,048,577" in capsys.readouterr().err
    handed_in(course, "04", "")
    for text in ("[" * 100_000, "[]", "{"):
        (course / "work" / "numbers.json").write_text(text)
        assert main(["04"]) == 2
        assert "numbers.json cannot be read" in capsys.readouterr().err


ENDS = """
import os
def kept_bytes(*_):
    print("\\x1b[2J\\rscore 14 of 14", flush=True)
    os._exit(0)
"""


def test_who_ends_the_judging_process_loses_that_criterion_and_keeps_what_was_earned(course, capsys):
    (course / "work").mkdir()
    file = exported(convert_to_notebook(SOURCES["04"]), course / "work")
    written = [line for line in file.read_text().splitlines() if "SOLUTION" not in line]
    file.write_text("\n".join(written) + ENDS)
    assert main(["04"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    recompute, kept_bytes = load_lesson_checks("04").CHECKS
    most = len(recompute.criteria) + len(kept_bytes.criteria) + len(load_lesson_checks("04").PREDICTIONS)
    assert last == f"score {len(recompute.criteria)} of {most}"
    assert any("process ended its process with exit code 0, which is no answer" in line for line in lines)
    assert r"       | \x1b[2J" in lines and not any(line.startswith("score") for line in lines)


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """`judged(code)`: the reports on two checks of two criteria by a process that runs `code` once asked."""
    checks = Check("first"), Check("second")
    for each in checks:
        each.criterion("is even", "property")(None)
        each.criterion("is small", "resource")(None)

    def run(code, **limits):
        monkeypatch.setattr(grade_lesson, "_JUDGE_COMMAND", [sys.executable, "-I", "-c", BEGIN + code])
        return grade_lesson.judge_in_subprocess("98", tmp_path / "L98.py", checks, ProcessLimits(**limits))
    return run


@pytest.mark.parametrize("code, why", [
    ("os.write(ask['pipe'], b'pass\\n')", "wrote what is no verdict: b'pass'"),
    ("os.write(ask['pipe'], b'[' * 100_000 + b'\\n')", "no verdict"),
    ("os.write(ask['pipe'], b'\\x80\\x05K\\x01.\\n')", "no verdict"),                       # a pickle
    ("ask['nonce'] = 'another'\n" + PASS, "no verdict"),
    (PASS.replace("is even", "is small"), "not asked"),
    (PASS.replace("ask['checks'][0]", "'third'"), "not asked"),
    (PASS.replace("'pass'", "'perfect'"), "not asked"), (PASS.replace("''", "None"), "not asked"),
    (PASS.replace("'pass'", "['pass']"), "not asked"), ("sys.exit(0)", "exit code 0, which is no answer"),
])
def test_what_is_no_verdict_scores_nothing(judged, code, why):
    for report in judged(code):
        assert [verdict.state for verdict in report.verdicts] == ["wrong", "not run"]
        assert why in report.first_failure.text and report.exit_code == 1


def test_the_next_check_is_judged_by_another_process(judged):
    reports = judged(PASS + "ask['checks'][0] == 'first' and os.kill(os.getpid(), 9)")
    assert [[verdict.state for verdict in report.verdicts] for report in reports] == [["pass", "wrong"]] * 2
    killed, gone = [report.first_failure.text for report in reports]
    assert "by SIGKILL" in killed and "exit code 0" in gone


def test_after_a_wrong_verdict_nothing_is_earned(judged):
    code = PASS.replace("'pass'", "'wrong'") + PASS.replace("even", "small") + PASS
    assert [report.points_earned for report in judged(code)] == [0, 0]
