"""A check: named criteria, in the order property, parity, resource, speed, that a student's code must meet.

    ring_all_reduce = Check("ring_all_reduce")
    @ring_all_reduce.criterion("every rank has the sum", "property")
    def _(subject): ...        # raises Wrong(text) or Blocked(text)

In a notebook `ring_all_reduce(fn)` raises on failure; tests use `.report(fn)`, grade `judge`. What is wrong
ends the check; blocked (no GPU) is never a pass. A lesson's checks.py holds its CHECKS and PREDICTIONS:
{key: unit}, or keys alone.
"""
import functools
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from nanoinfra.distributed.pool.rank_processes import RanksError
from nanoinfra.distributed.pool.ranks import Ranks
from nanoinfra.lab.course import lesson_folders, make_lessons_importable
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.exercise import source_location

_NO_NAME = re.compile(r"NameError: name '\w+' is not defined")
CRITERION_LAYERS = ("property", "parity", "resource", "speed")


class CriterionNotMet(Exception):
    """A criterion is not met. The text names rank, tensor, index, want, got and the usual cause."""


class CriterionBlocked(Exception):
    """A criterion cannot be judged on this machine."""


class CheckFailed(Exception):
    """What a check raises in a notebook: the text alone, without a traceback through the checker."""

    def _render_traceback_(self):
        return [str(self)]


@dataclass(frozen=True)
class Criterion:
    """One thing to meet. `test(subject)` returns, or raises Wrong or Blocked."""
    name: str
    layer: str                 # of LAYERS
    test: Callable


@dataclass(frozen=True)
class Verdict:
    """How one criterion went: "pass", "wrong", "blocked" or "not run"."""
    criterion: Criterion
    state: str
    text: str = ""


@dataclass(frozen=True, repr=False)
class CheckReport(DisplayTable):
    """All verdicts of one check on one subject; shows itself as a table."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def points_earned(self) -> int:
        """Criteria met."""
        return sum(v.state == "pass" for v in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0 all met, 1 something wrong, 2 something blocked and nothing wrong."""
        states = [v.state for v in self.verdicts]
        return 1 if "wrong" in states else 0 if set(states) == {"pass"} else 2

    @property
    def first_failure(self) -> Verdict | None:
        """The criterion that rejected the subject, if one did."""
        return next((v for v in self.verdicts if v.state == "wrong"), None)


@dataclass
class Check:
    """A list of criteria under the name of the function they judge."""
    name: str
    criteria: list[Criterion] = field(default_factory=list)

    def criterion(self, name: str, layer: str) -> Callable:
        """Decorator: the function becomes the next criterion. Layers come in the order of LAYERS."""
        order = [CRITERION_LAYERS.index(c.layer) for c in self.criteria] + [CRITERION_LAYERS.index(layer)]
        if order != sorted(order):
            raise ValueError(f"{self.name}: {name!r} is of layer {layer} and comes after one of layer "
                             f"{self.criteria[-1].layer}; the order is {', '.join(CRITERION_LAYERS)}")

        def add(test):
            self.criteria.append(Criterion(name, layer, test))
            return test
        return add

    def report(self, subject: Callable) -> CheckReport:
        """Judge `subject`, criterion after criterion, until one is wrong."""
        verdicts = []
        for criterion in self.criteria:
            verdicts.append(judge_criterion(criterion, subject))
            if verdicts[-1].state == "wrong":
                break
        return self.report_of_verdicts(verdicts, source_location(subject))

    def report_of_verdicts(self, verdicts: list[Verdict], source: str) -> CheckReport:
        """The report of `verdicts` on what was written in `source`; further criteria were not run."""
        verdicts = [*verdicts, *(Verdict(c, "not run") for c in self.criteria[len(verdicts):])]
        rows = [(v.criterion.name, v.criterion.layer, v.state) for v in verdicts]
        return CheckReport(f"{self.name} of {source}", ("criterion", "layer", "verdict"), rows,
                           tuple(verdicts))

    def __call__(self, subject: Callable) -> CheckReport:
        """Judge `subject`; raises Failed with the table and the reason unless every criterion is met."""
        report = self.report(subject)
        if report.exit_code:
            reasons = [f"{v.criterion.name}: {v.text}" for v in report.verdicts if v.text]
            raise CheckFailed("\n".join([repr(report), *reasons]))
        return report


def judge_criterion(criterion: Criterion, subject: Callable) -> Verdict:
    """How `subject` meets one criterion."""
    try:
        criterion.test(subject)
    except CriterionBlocked as reason:
        return Verdict(criterion, "blocked", str(reason))
    except CriterionNotMet as reason:
        return Verdict(criterion, "wrong", str(reason))
    except (Exception, SystemExit) as error:         # whatever a student's code raises is a verdict
        unwritten = isinstance(error, NotImplementedError) or "raise NotImplementedError" in str(error)
        kind = "" if isinstance(error, RanksError) else f"{type(error).__name__}: "
        text = "not written yet" if unwritten else f"{kind}{error}"
        alone = "\nwork/LNN.py stands alone: import inside the exercise cell what it uses"
        return Verdict(criterion, "wrong", text + (alone if _NO_NAME.search(text) else ""))
    return Verdict(criterion, "pass")


def rank_pool_for_checks(n: int) -> Ranks:
    """The pool of `n` ranks that all checks share. It has little patience: what hangs ends after 15 s."""
    pool = _shared_pool(n)
    pool.timeout = scale_timeout_by_load(15.0)
    return pool


_shared_pool = functools.cache(Ranks)


def scale_timeout_by_load(seconds: float) -> float:
    """How long to wait for what takes at most `seconds` on an idle machine: longer, the higher the load."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def load_lesson_checks(number: str) -> ModuleType:
    """The checks of lesson "02": a module with `CHECKS` and `PREDICTIONS`. ValueError where there is none."""
    folders = lesson_folders(holding="checks.py")
    key = number.upper().removeprefix("L").zfill(2)
    if key not in folders:
        raise ValueError(f"lesson {number!r} has no checks; there are {', '.join(folders)}")
    make_lessons_importable()
    return importlib.import_module(f"lessons.{folders[key].name}.checks")
