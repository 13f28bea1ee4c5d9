"""Mutation tests of checks: a check must reject each known-wrong variant, by the criterion for its mistake.

    python -m nanoinfra.lab.mutants [FOLDER]

judges the variants in the `MUTANTS` lists of all lessons and of tests/mutants, or of FOLDER/*.py. It exits
with 1 if a variant survives or is rejected by another criterion, or if a check has fewer than two variants.
"""
import argparse
import functools
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from nanoinfra.lab.check import Check
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.exercise import load_python_file
from nanoinfra.lab.find_course_folder import (
    clone_folder,
    course_folder,
    lesson_folders,
    make_lessons_importable,
)


@dataclass(frozen=True)
class Mutant:
    """A known-wrong `variant` of a function that `check` judges, and the criterion that must reject it."""
    name: str
    check: Check
    variant: Callable
    rejected_by: str


def patched(subject: Callable, target: str, replacement: object) -> Callable:
    """`subject`, during whose calls the attribute `target`, "module:attribute", has another value.

    The patch is applied in the process that makes the call, so that it reaches rank processes too.
    """
    module, attribute = target.split(":")

    @functools.wraps(subject)
    def variant(*args, **kwargs):
        with mock.patch.object(importlib.import_module(module), attribute, replacement):
            return subject(*args, **kwargs)
    return variant


def collect_lesson_mutants(number: str = "") -> list[Mutant]:
    """The known-wrong variants for the checks of lesson "02", or of all lessons. ValueError for none."""
    folders = lesson_folders(with_file="mutants.py")
    if number and number not in folders:
        raise ValueError(f"no mutants of lesson {number!r}, but {', '.join(folders) or 'of none at all'}; "
                         f"they come with nanoinfra's repository, not with the package: work inside a clone")
    return _load([folder / "mutants.py" for key, folder in folders.items() if number in ("", key)])


def collect_library_mutants(name: str = "*", folder: Path | str | None = None) -> list[Mutant]:
    """The known-wrong variants of the library in tests/mutants, or in `folder`. ValueError for none."""
    folders = [Path(folder)] if folder else [home / "tests" / "mutants"
                                             for home in (course_folder(), clone_folder())]
    files = next((found for each in folders if (found := sorted(each.glob(f"{name}.py")))), [])
    if not files:
        raise ValueError(f"no mutants {name}.py in {' or '.join(map(str, folders))}; they come with "
                         f"nanoinfra's repository, not with the package: work inside a clone, or name it")
    return _load(files)


def _load(files):
    make_lessons_importable()
    return [mutant for file in files for mutant in getattr(load_python_file(file), "MUTANTS", [])]


def rejecting_criterion(mutant: Mutant) -> str:
    """Judge a mutant; returns the name of the criterion that rejects it, "" if it survives."""
    failure = mutant.check.report(mutant.variant).first_failure
    return failure.criterion.name if failure else ""


def run_mutants(mutants: list[Mutant]) -> DisplayTable:
    """Judge all mutants; returns a table with a verdict, "pass" or "wrong", for each."""
    rows = []
    for m in mutants:
        got = rejecting_criterion(m)
        rows.append((m.check.name, m.name, got or "(survives)", "pass" if got == m.rejected_by else "wrong"))
    for name, count in Counter(m.check.name for m in mutants).items():
        if count < 2:
            rows.append((name, "(a check needs two mutants)", f"(has {count})", "wrong"))
    return DisplayTable("mutants", ("check", "variant", "rejected by", ""), rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.mutants", description="check the checks")
    parser.add_argument("folder", nargs="?")
    folder = parser.parse_args(argv).folder
    lessons = [] if folder else collect_lesson_mutants()
    grid = run_mutants([*lessons, *collect_library_mutants(folder=folder)])
    grid.show()
    return int(any(row[-1] == "wrong" for row in grid.rows))


if __name__ == "__main__":
    sys.exit(main())
