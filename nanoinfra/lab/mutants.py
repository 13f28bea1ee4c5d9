"""Checks are checked: each known-wrong variant must be rejected, by the criterion that names its mistake.

    python -m nanoinfra.lab.mutants [FOLDER]

judges every `MUTANTS` list in FOLDER/*.py (tests/mutants), and exits 1 if one survives or is rejected by
another criterion, or if a check has fewer than two.
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
from nanoinfra.lab.exercise import load
from nanoinfra.lab.table import Grid
from nanoinfra.lab.where import project, root


@dataclass(frozen=True)
class Mutant:
    """A known-wrong `variant` of what `check` judges, and the name of the criterion that must reject it."""
    name: str
    check: Check
    variant: Callable
    rejected_by: str


def patched(subject: Callable, target: str, replacement: object) -> Callable:
    """`subject` with "module:attribute" replaced while it runs: a mutant of the library.

    The patch is applied where the call happens: it reaches the rank processes, as one in the parent does not.
    """
    module, attribute = target.split(":")

    @functools.wraps(subject)
    def variant(*args, **kwargs):
        with mock.patch.object(importlib.import_module(module), attribute, replacement):
            return subject(*args, **kwargs)
    return variant


def collect(folder: Path | str | None = None, file: str = "*") -> list[Mutant]:
    """The mutants of `folder`, all of them or those of one file, say "l02_ring".

    By default tests/mutants, from here upwards or of nanoinfra's own clone. ValueError where there are none.
    """
    folders = [Path(folder)] if folder else [home / "tests" / "mutants" for home in (root(), project())]
    files = next((found for f in folders if (found := sorted(f.glob(f"{file}.py")))), [])
    if not files:
        raise ValueError(f"no mutants {file}.py in {' or '.join(map(str, folders))}; they come with "
                         f"nanoinfra's repository, not with the package: work inside a clone, or name it")
    return [mutant for path in files for mutant in getattr(load(path), "MUTANTS", [])]


def rejected_by(mutant: Mutant) -> str:
    """The name of the criterion that rejects it; empty if it survives."""
    failure = mutant.check.report(mutant.variant).first_failure
    return failure.criterion.name if failure else ""


def run(mutants: list[Mutant]) -> Grid:
    """Judge all; the last column says pass, or wrong."""
    rows = []
    for m in mutants:
        got = rejected_by(m)
        rows.append((m.check.name, m.name, got or "(survives)", "pass" if got == m.rejected_by else "wrong"))
    for name, count in Counter(m.check.name for m in mutants).items():
        if count < 2:
            rows.append((name, "(a check needs two mutants)", f"(has {count})", "wrong"))
    return Grid("mutants", ("check", "variant", "rejected by", ""), rows)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.mutants", description="check the checks")
    parser.add_argument("folder", nargs="?")
    grid = run(collect(parser.parse_args(argv).folder))
    grid.show()
    return int(any(row[-1] == "wrong" for row in grid.rows))


if __name__ == "__main__":
    sys.exit(main())
