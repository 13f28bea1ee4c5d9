"""Grade a lesson: `python -m nanoinfra.lab.grading.grade_lesson 02 [--file work/L02.py]`.

A point is given for each criterion that is met and each prediction that was made. The exit code is 0 for the
full score, 1 if something is wrong, 2 if a criterion is blocked or there is nothing to grade. The file runs
in a separate process within limits (judge.py, limited_process.py). A reference solution is refused;
`--reference` grades the lesson's own.
"""
import argparse
import json
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from nanoinfra.lab import check, exercise
from nanoinfra.lab import predict as book
from nanoinfra.lab.build_notebooks import find_lesson_sources
from nanoinfra.lab.check import Check, CheckReport, Verdict
from nanoinfra.lab.find_course_folder import display_path, lessons_folder, work_folder
from nanoinfra.lab.grading.limited_process import LimitedProcess, ProcessGaveNoLine, ProcessLimits

_JUDGE_COMMAND = [sys.executable, "-P", "-m", "nanoinfra.lab.grading.judge_process"]
_DEFAULT_LIMITS = ProcessLimits()
_MAX_HAND_IN_BYTES = 1 << 20                                   # of a file that is handed in


def grade_lesson(lesson_number: str, file: Path | str | None = None, grade_reference: bool = False,
                 limits: ProcessLimits = _DEFAULT_LIMITS) -> int:
    """Grade `file` (default work/L02.py) for lesson "02": print the score, return the exit code.

    Predictions are read from numbers.json beside `file`. ValueError for what cannot be graded.
    """
    checks = check.load_lesson_checks(lesson_number)
    number = lesson_number.upper().removeprefix("L").zfill(2)
    if grade_reference:
        with tempfile.TemporaryDirectory() as folder:
            exercise.export_exercises_of_notebook(find_lesson_sources(number)[0] / "lesson.py", folder)
            file = Path(folder) / f"L{number}.py"
            print(f"grading {display_path(file)}")
            return _score(judge_in_subprocess(number, file, checks.CHECKS, limits), {})
    file = Path(file or work_folder() / f"L{number}.py")
    if not file.is_file():
        raise ValueError(f"{display_path(file)} does not exist; run the exercise cells of lesson {number}'s "
                         f"student edition (make student), or name a --file")
    _refuse_large(file)
    exercise.refuse_reference_solution(file)
    print(f"grading {display_path(file)}")
    made = _predictions(file.parent / "numbers.json", checks.PREDICTIONS)
    return _score(judge_in_subprocess(number, file, checks.CHECKS, limits), made)


def judge_in_subprocess(lesson: str, file: Path, checks: tuple[Check, ...],
                        limits: ProcessLimits) -> list[CheckReport]:
    """Judge `file` in a child process; returns the report of each check.

    If that process ends or is past a limit, its current criterion is wrong, and another process judges the
    next check. A line about any criterion but the expected one is no verdict, and ends the process.
    """
    verdicts = {each.name: [] for each in checks}
    while todo := _todo(checks, verdicts):
        ask = {"lesson": lesson, "checks": [*dict(todo)], "course": str(lessons_folder().parent),
               "file": str(file.resolve()), "shown": display_path(file), "nonce": secrets.token_hex(16)}
        with LimitedProcess(_JUDGE_COMMAND, ask, limits) as process:
            try:
                _answer(process, ask["nonce"])                                  # it has started
                while todo:
                    verdicts[todo[0][0]].append(_verdict(_answer(process, ask["nonce"]), *todo[0]))
                    todo = _todo(checks, verdicts)
            except ProcessGaveNoLine as reason:
                name, criterion = todo[0]
                verdicts[name].append(Verdict(criterion, "wrong", f"the judged process {reason}"))
        _say(process.captured_output, "       | ")
    return [each.report_of_verdicts(verdicts[each.name], display_path(file)) for each in checks]


def _todo(checks, verdicts):
    """(name of its check, criterion) of all that have no verdict yet, up to a check's first wrong one."""
    return [(each.name, criterion) for each in checks
            if all(verdict.state != "wrong" for verdict in verdicts[each.name])
            for criterion in each.criteria[len(verdicts[each.name]):]]


def _answer(process, nonce):
    line = process.read_line()
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):               # brackets without end
        said = None
    if not isinstance(said, dict) or said.get("nonce") != nonce:
        raise ProcessGaveNoLine(f"wrote what is no verdict: {line[:60]!r}")
    return said


def _verdict(said, name, criterion):
    state, text = said.get("state"), said.get("text")
    asked = (said.get("check"), said.get("criterion")) == (name, criterion.name)
    if not asked or state not in ("pass", "wrong", "blocked") or type(text) is not str:
        raise ProcessGaveNoLine(f"gave a verdict that was not asked: {str(said)[:200]}")
    return Verdict(criterion, state, text)


def _predictions(file, asked):
    """{key: was it predicted?} by the student's numbers.json."""
    try:
        if file.exists():
            _refuse_large(file)
        numbers = book.read_predictions(file)
        return {key: bool(numbers.get(key)) for key in asked}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{display_path(file)} cannot be read ({type(error).__name__}: {error}); "
                         f"predict again, or move it away") from error


def _refuse_large(file):
    size = file.stat().st_size
    if not file.is_file() or size > _MAX_HAND_IN_BYTES:
        raise ValueError(f"{display_path(file)} is no file of at most {_MAX_HAND_IN_BYTES:,} bytes, but has "
                         f"{size:,}; hand in what the notebook wrote")


def _score(reports, made):
    """Print predictions {key: made?}, verdicts and the sum; returns the exit code."""
    for key, done in made.items():
        print(f"  {int(done)}/1  prediction {key}{'' if done else ': not made'}")
    for report in reports:
        print(f"  {report.points_earned}/{len(report.verdicts)}  {report.title.split(' of ')[0]}")
        for verdict in report.verdicts:
            reason = f": {verdict.text}" if verdict.text else ""
            _say(f"{verdict.state:<8} {verdict.criterion.name}{reason}", "       ")
    most = len(made) + sum(len(report.verdicts) for report in reports)
    print("       the answers under Explain are for a person to read, and not in this total")
    print(f"score {sum(made.values()) + sum(report.points_earned for report in reports)} of {most}")
    codes = {report.exit_code for report in reports} | ({0} if all(made.values()) else {1})
    return 1 if 1 in codes else max(codes)


def _say(text, margin):
    """Print each line behind `margin`, and nothing that moves a terminal's cursor: no line of it is ours."""
    for line in text.splitlines():
        print(margin + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line.expandtabs()))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.grading.grade_lesson",
                                     description="grade a lesson")
    parser.add_argument("lesson", help="its number, as 02")
    parser.add_argument("--file", help="default work/L<lesson>.py")
    parser.add_argument("--reference", action="store_true", help="grade the lesson's own solutions")
    given = parser.parse_args(argv)
    try:
        return grade_lesson(given.lesson, given.file, given.reference)
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))       # so that nothing stays
    sys.exit(main())
