"""Grade a lesson: `python -m nanoinfra.lab.grade 02 [--file work/L02.py]`.

A point for each criterion met and each prediction made. Exit 0 full score, 1 something wrong, 2 blocked or
nothing to grade. The reference solution is refused, unless `--reference` asks whether the lesson itself can
be passed.
"""
import argparse
import sys
import tempfile
from pathlib import Path

from nanoinfra.lab import check, exercise
from nanoinfra.lab import predict as book
from nanoinfra.lab.build import sources
from nanoinfra.lab.where import shown, work


def grade(lesson: str, file: Path | str | None = None, reference: bool = False) -> int:
    """Print score and reasons for `lesson` ("02"); returns the exit code. Predictions lie beside `file`."""
    checks = check.lesson(lesson)
    number = lesson.upper().removeprefix("L").zfill(2)
    if reference:
        with tempfile.TemporaryDirectory() as folder:
            exercise.extract(sources(number)[0], folder)
            return _judge(checks, Path(folder) / f"L{number}.py", predictions=())
    file = Path(file or work() / f"L{number}.py")
    if not file.is_file():
        raise ValueError(f"{shown(file)} does not exist; run the exercise cells of lesson {number}'s student "
                         f"edition (make student), or name a --file")
    exercise.refuse_reference(file)
    return _judge(checks, file, checks.PREDICTIONS)


def _judge(checks, file, predictions):
    print(f"grading {shown(file)}")
    made = [key for key in predictions if book.read(file.parent / "numbers.json").get(key)]
    for key in predictions:
        print(f"  {'1/1' if key in made else '0/1'}  prediction {key}{'' if key in made else ': not made'}")
    reports = [c.report(_find(file, c.name)) for c in checks.CHECKS]
    for report in reports:
        print(f"  {report.points}/{len(report.verdicts)}  {report.title.split(' of ')[0]}")
        for verdict in report.verdicts:
            reason = f": {verdict.text}" if verdict.text else ""
            print(f"       {verdict.state:<8} {verdict.criterion.name}{reason}")
    most = len(predictions) + sum(len(report.verdicts) for report in reports)
    print("       the answers under Explain are for a person to read, and not in this total")
    print(f"score {len(made) + sum(report.points for report in reports)} of {most}")
    codes = {r.exit_code for r in reports} | ({1} if len(made) < len(predictions) else set())
    return 1 if 1 in codes else max(codes)


def _find(file, name):
    """The function `name` of `file`, or one that says why there is none."""
    try:
        return getattr(exercise.load(file), name)
    except Exception as error:                       # a missing function costs its own points, no more
        reason = error

        def missing(*_, **__):
            raise check.Wrong(f"{shown(file)} gives no {name}: {type(reason).__name__}: {reason}")
        return missing


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.grade", description="grade a lesson")
    parser.add_argument("lesson", help="its number, as 02")
    parser.add_argument("--file", help="default work/L<lesson>.py")
    parser.add_argument("--reference", action="store_true", help="grade the lesson's own solutions")
    given = parser.parse_args(argv)
    try:
        return grade(given.lesson, given.file, given.reference)
    except ValueError as mistake:
        print(mistake, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
