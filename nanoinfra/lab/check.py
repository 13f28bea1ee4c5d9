"""A check is a list of named criteria that a student's function must meet, in the order of CRITERION_LAYERS.

    ring_all_reduce = Check("ring_all_reduce")
    @ring_all_reduce.criterion("every rank has the sum", "property")
    def _(subject): ...        # raises CriterionNotMet(text) or CriterionBlocked(text)

In a notebook `ring_all_reduce(fn)` raises CheckFailed; tests call `.report(fn)`. The first criterion that is
not met ends the check. A lesson's checks.py has CHECKS, a tuple of these, and PREDICTIONS, {key: unit}.
"""
import functools
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.distributed.pool.rank_processes import RankFailedError
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.exercise import source_location
from nanoinfra.lab.find_course_folder import lesson_folders, make_lessons_importable

_NO_NAME = re.compile(r"NameError: name '\w+' is not defined")
CRITERION_LAYERS = ("property", "parity", "resource", "speed")


class CriterionNotMet(Exception):
    """A criterion is not met. The text names rank, tensor, index, want, got and the usual cause."""


class CriterionBlocked(Exception):
    """A criterion cannot be judged on this machine, for example for want of a GPU. This is never a pass."""


class CheckFailed(Exception):
    """A check raises this in a notebook. Jupyter shows its text alone, without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


@dataclass(frozen=True)
class Criterion:
    """One requirement. `test(subject)` returns, or raises CriterionNotMet or CriterionBlocked."""
    name: str
    layer: str                 # of CRITERION_LAYERS
    test: Callable


@dataclass(frozen=True)
class Verdict:
    """The result of one criterion. `state` is "pass", "wrong", "blocked" or "not run", `text` why."""
    criterion: Criterion
    state: str
    text: str = ""


@dataclass(frozen=True, repr=False)
class CheckReport(DisplayTable):
    """All verdicts of one check on one subject. It displays itself as a table."""
    verdicts: tuple[Verdict, ...] = ()

    @property
    def points_earned(self) -> int:
        """The number of criteria that are met: a point for each."""
        return sum(v.state == "pass" for v in self.verdicts)

    @property
    def exit_code(self) -> int:
        """0 if all criteria are met, 1 if one is wrong, 2 if one is blocked and none is wrong."""
        states = [v.state for v in self.verdicts]
        return 1 if "wrong" in states else 0 if set(states) == {"pass"} else 2

    @property
    def first_failure(self) -> Verdict | None:
        """The verdict that rejected the subject, None if there is none."""
        return next((v for v in self.verdicts if v.state == "wrong"), None)


@dataclass
class Check:
    """The criteria for one function, under the name of that function."""
    name: str
    criteria: list[Criterion] = field(default_factory=list)

    def criterion(self, name: str, layer: str) -> Callable:
        """Decorator that adds a function as the next criterion. ValueError for a layer out of order."""
        order = [CRITERION_LAYERS.index(c.layer) for c in self.criteria] + [CRITERION_LAYERS.index(layer)]
        if order != sorted(order):
            raise ValueError(f"{self.name}: {name!r} is of layer {layer} and comes after one of layer "
                             f"{self.criteria[-1].layer}; the order is {', '.join(CRITERION_LAYERS)}")

        def add(test):
            self.criteria.append(Criterion(name, layer, test))
            return test
        return add

    def report(self, subject: Callable) -> CheckReport:
        """Judge `subject` by one criterion after another, until one is not met."""
        verdicts = []
        for criterion in self.criteria:
            verdicts.append(judge_criterion(criterion, subject))
            if verdicts[-1].state == "wrong":
                break
        return self.report_of_verdicts(verdicts, source_location(subject))

    def report_of_verdicts(self, verdicts: list[Verdict], source: str) -> CheckReport:
        """The report of `verdicts` on a function of the file `source`; later criteria count as not run."""
        verdicts = [*verdicts, *(Verdict(c, "not run") for c in self.criteria[len(verdicts):])]
        rows = [(v.criterion.name, v.criterion.layer, v.state) for v in verdicts]
        return CheckReport(f"{self.name} of {source}", ("criterion", "layer", "verdict"), rows,
                           tuple(verdicts))

    def __call__(self, subject: Callable) -> CheckReport:
        """Judge `subject`. Raises CheckFailed, with table and reasons, unless every criterion is met."""
        report = self.report(subject)
        if report.exit_code:
            reasons = [f"{v.criterion.name}: {v.text}" for v in report.verdicts if v.text]
            raise CheckFailed("\n".join([repr(report), *reasons]))
        return report


def judge_criterion(criterion: Criterion, subject: Callable) -> Verdict:
    """Run one criterion on `subject`. Whatever the student's code raises becomes a verdict."""
    try:
        criterion.test(subject)
    except CriterionBlocked as reason:
        return Verdict(criterion, "blocked", str(reason))
    except CriterionNotMet as reason:
        return Verdict(criterion, "wrong", str(reason))
    except (Exception, SystemExit) as error:         # whatever a student's code raises is a verdict
        unwritten = isinstance(error, NotImplementedError) or "raise NotImplementedError" in str(error)
        kind = "" if isinstance(error, RankFailedError) else f"{type(error).__name__}: "
        text = "not written yet" if unwritten else f"{kind}{error}"
        alone = "\nwork/LNN.py stands alone: import inside the exercise cell what it uses"
        return Verdict(criterion, "wrong", text + (alone if _NO_NAME.search(text) else ""))
    return Verdict(criterion, "pass")


def rank_pool_for_checks(num_ranks: int) -> RankPool:
    """The pool of rank processes that all checks share. A call that hangs ends after 15 s."""
    pool = _shared_pool(num_ranks)
    pool.timeout = scale_timeout_by_load(15.0)
    return pool


_shared_pool = functools.cache(RankPool)


def scale_timeout_by_load(seconds: float) -> float:
    """A timeout for work that takes at most `seconds` on an idle machine: times the load of each core."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def load_lesson_checks(lesson_number: str) -> ModuleType:
    """Import checks.py of lesson "02", which has CHECKS and PREDICTIONS. ValueError where there is none."""
    folders = lesson_folders(with_file="checks.py")
    key = lesson_number.upper().removeprefix("L").zfill(2)
    if key not in folders:
        raise ValueError(f"lesson {lesson_number!r} has no checks; there are {', '.join(folders)}")
    make_lessons_importable()
    return importlib.import_module(f"lessons.{folders[key].name}.checks")
