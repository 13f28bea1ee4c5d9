"""CPU seconds of each test, of all it has started too, summed by folder at the end of a run.

Wall time says how loaded the machine was; this says what the tests cost. `--allowance` fails a run in which
a folder takes more than pyproject.toml allows it, on a machine as fast as the one the numbers are from.
"""
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from tests.processes import below

ROOT = Path(__file__).parents[1]
IMPORT_TORCH = 1.75                          # CPU seconds, on the machine that the allowances are from


class Meter:
    """A sum that does not shrink when a process ends that nobody waits for: note it while it still runs."""

    def __init__(self):
        self.total, self.last, self.told = 0.0, 0.0, 0.0

    def note(self) -> float:
        """CPU seconds of this process and of all below it, as far as they were seen."""
        now = sum(os.times()[:2]) + below()
        self.total, self.last = self.total + max(0.0, now - self.last), now
        return self.total

    def since(self) -> float:
        """Those since this was asked last."""
        before, self.told = self.told, self.note()
        return self.told - before


METER = Meter()


def add_option(parser):
    """For conftest.py, which is asked before this is known."""
    parser.addoption("--allowance", action="store_true", help="fail where a folder takes more CPU seconds "
                     "than pyproject.toml allows it")


def pytest_collection_finish():
    METER.since()                            # what came before any test is none's


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", METER.since()))


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        TESTS[report.nodeid] = dict(report.user_properties).get("cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter, config):
    folders = by_folder(TESTS)
    each = ", ".join(f"{name} {seconds:.0f}" for name, seconds in folders.items())
    if folders:
        terminalreporter.write_line(f"CPU seconds: {each}; all {sum(folders.values()):.0f}")


def pytest_sessionfinish(session):
    """Only the process that collects the reports judges; a worker of xdist has a part of them."""
    if session.config.getoption("--allowance") and not hasattr(session.config, "workerinput"):
        for line in exceeded(by_folder(TESTS), allowances(), slowness()):
            print(f"\n{line}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def by_folder(tests: dict[str, float]) -> dict[str, float]:
    """CPU seconds of each folder of tests/, the dearest first; what lies beside them is "tests"."""
    folders = defaultdict(float)
    for name, seconds in tests.items():
        folder = Path(name.partition("::")[0]).parent.name
        folders[folder] += seconds
    return dict(sorted(folders.items(), key=lambda entry: -entry[1]))


def exceeded(folders: dict[str, float], allowed: dict[str, float], slow: float) -> list[str]:
    """A line for each folder that takes more than it may."""
    most = {name: allowed.get(name, 0) * slow for name in folders}
    return [f"tests/{name} took {seconds:.0f} CPU seconds, allowed are {most[name]:.0f}: make tests cheaper, "
            "or move what repeats a mechanism to make prove"
            for name, seconds in folders.items() if seconds > most[name]]


def allowances() -> dict[str, float]:
    """CPU seconds by folder, from pyproject.toml."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["nanoinfra"]["cpu-seconds"]


def slowness() -> float:
    """How much longer than where the allowances are from this machine takes to import torch: at least 1."""
    def spent():
        before = sum(os.times()[2:4])
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        return sum(os.times()[2:4]) - before
    return max(1.0, min(spent() for _ in range(3)) / IMPORT_TORCH)


TESTS: dict[str, float] = {}
