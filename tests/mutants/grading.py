"""Known-wrong graders of hand-ins that end, hang, use memory, forge verdicts or start processes."""
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import psutil

from nanoinfra.lab import check
from nanoinfra.lab.check import Check, CriterionBlocked, CriterionNotMet, Verdict
from nanoinfra.lab.grading import grade_lesson, judge_process
from nanoinfra.lab.grading.limited_process import LimitedProcess, ProcessLimits
from nanoinfra.lab.mutants import Mutant, patched
from tests.lab.judging import BEGIN, PASS

FORGED = {"no nonce": "ask['nonce'] = ''\n" + PASS, "another criterion": PASS.replace("even", "odd"),
          "another check": PASS.replace("ask['checks'][0]", "'third'"), "an exit": "sys.exit(0)"}
ORPHAN = """
if os.fork() == 0:
    os.setsid()                                        # out of its group and session, and nobody's child
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(30)
    os._exit(0)
time.sleep(0.5)
"""
SHARES = f"""
mine = bytearray(100 << 20)
if not all(os.fork() for _ in range(4)):
    time.sleep(30)
time.sleep(1)
{PASS}"""
GROWS = "mine = bytearray(300 << 20)\ntime.sleep(2)\n"
PATCHES = """
import sys
check = sys.modules["nanoinfra.lab.check"]
check.judge_criterion = lambda criterion, _: check.Verdict(criterion, "pass")
def first(): return 1
"""
LINUX = sys.platform == "linux"                        # elsewhere nothing adopts, and shared pages count each


def toy():
    """Two checks of two criteria."""
    checks = Check("first"), Check("second")
    for each in checks:
        each.criterion("is even", "property")(lambda f: _expect(f() % 2 == 0, "odd"))
        each.criterion("is small", "resource")(lambda f: _expect(f() < 10, "large"))
    return checks


def _expect(right, text):
    if not right:
        raise CriterionNotMet(text)


def judged(code, n=1, **limits):
    """{points, why: the reasons, printed} on n checks by processes that run `code` instead of judging."""
    printed = []
    with (mock.patch.object(grade_lesson, "_JUDGE_COMMAND", [sys.executable, "-I", "-c", BEGIN + code]),
          mock.patch.object(grade_lesson, "_say", lambda text, _: printed.append(text))):
        reports = grade_lesson.judge_in_subprocess("98", Path("L98.py"), toy()[:n], ProcessLimits(**limits))
    why = [verdict.text for report in reports for verdict in report.verdicts if verdict.text]
    return {"points": sum(report.points_earned for report in reports), "why": why,
            "printed": "".join(printed)}


def in_place(code):
    """The verdicts on a file of `code` by the judging process's own loop, in this process."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(check, "judge_criterion",
                                                                    check.judge_criterion):
        file = Path(folder, "L98.py")
        file.write_text(code)
        return [verdict for _, verdict in judge_process.judge_file(toy()[:1], str(file), "L98.py")]


grading, judging, limiting, ending = (Check(name) for name in ("grading", "judging", "limiting", "ending"))


@grading.criterion("what is no verdict earns nothing", "property")
def _(subject):
    for name, code in FORGED.items():
        if subject(code)["points"]:
            raise CriterionNotMet(f"{name}: a point")


@grading.criterion("the next check is judged", "property")
def _(subject):
    got = subject(PASS, n=2)
    if (got["points"], len(got["why"])) != (2, 2):
        raise CriterionNotMet(f"a process that judges one criterion of each check and ends: {got}")


@limiting.criterion("what hangs ends", "resource")
def _(subject):
    why = subject("time.sleep(2)", seconds_per_line=0.3)["why"]
    if "gave no answer" not in why[0]:
        raise CriterionNotMet(f"2 s in silence, where 0.3 s may be: {why}")


@limiting.criterion("memory is watched", "resource")
def _(subject):
    why = subject(GROWS, memory_bytes=200 << 20)["why"]
    if "of memory" not in why[0]:
        raise CriterionNotMet(f"300 MiB where 200 may be: {why}")


@limiting.criterion("shared pages count once", "resource")
def _(subject):
    if LINUX and (why := subject(SHARES, memory_bytes=300 << 20)["why"][0]) and "of memory" in why:
        raise CriterionNotMet(f"five processes share 100 MiB: {why}")


@ending.criterion("no process stays", "resource")
def _(subject):
    pids = [int(pid) for pid in subject(ORPHAN)["printed"].split()]
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for process in left:
        process.kill()
    if LINUX and left:
        raise CriterionNotMet(f"{len(left)} of {len(pids)} processes were left")


@limiting.criterion("of what is printed the beginning is kept", "resource")
def _(subject):
    if len(printed := subject("print('x' * (1 << 20))", kept_output_bytes=100)["printed"]) > 200:
        raise CriterionNotMet(f"{len(printed):,} characters, where 100 may be")


@limiting.criterion("no secret is in the environment", "resource")
def _(subject):
    with mock.patch.dict(os.environ, SOME_API_KEY="secret"):
        if "secret" in subject("print(os.environ)", kept_output_bytes=1 << 20)["printed"]:
            raise CriterionNotMet("it sees SOME_API_KEY")


@judging.criterion("a patch of the checker is no point", "property")
def _(subject):
    _none(subject(PATCHES))


@judging.criterion("leaving is wrong", "property")
def _(subject):
    for code in ("raise SystemExit(0)", "def first(): raise SystemExit(0)"):
        try:
            _none(subject(code))
        except SystemExit:
            raise CriterionNotMet(f"{code} ends the judge") from None


def _none(verdicts):
    if [verdict.state for verdict in verdicts] != ["wrong"]:
        raise CriterionNotMet(f"{[verdict.state for verdict in verdicts]}, want wrong at once")


def of_any_name(said, name, criterion):
    return Verdict(criterion, said["state"], said["text"])


def trusting(criterion, state, text=""):
    return Verdict(criterion, "pass" if "exit code 0" in text else state, text)


def until_one_has_ended(checks, verdicts, todo=grade_lesson._todo):
    ended = any(verdict.state == "wrong" for each in verdicts.values() for verdict in each)
    return [] if ended else todo(checks, verdicts)


def without_nonce(process, nonce):
    return grade_lesson.json.loads(process.read_line())


def each_its_own(process, exact):
    return process.memory_info().rss


def all_but_exits(criterion, subject):
    try:
        criterion.test(subject)
    except CriterionBlocked as reason:
        return Verdict(criterion, "blocked", str(reason))
    except Exception as reason:
        return Verdict(criterion, "wrong", str(reason))
    return Verdict(criterion, "pass")


def as_it_is(code, names):
    return lambda *args: check.judge_criterion(*args)


class Patient(LimitedProcess):                      # a look at memory alone
    def _look(self, seconds):
        super()._look(0.0)


class EndsItAlone(LimitedProcess):                  # and not what it started
    def _end(self):
        self._process.kill()
        self._process.wait()


class KeepsAll(LimitedProcess):
    def __init__(self, command, request, limits):
        super().__init__(command, request, replace(limits, kept_output_bytes=1 << 30))


POINT, NEXT = (c.name for c in grading.criteria)
HANGS, MEMORY, SHARED, PRINTED, SECRET = (c.name for c in limiting.criteria)
PATCHED, LEAVES = (c.name for c in judging.criteria)
(STAYS,) = (c.name for c in ending.criteria)
GRADE, LIMITED = "nanoinfra.lab.grading.grade_lesson", "nanoinfra.lab.grading.limited_process"
VARIANTS = {
    "a line without the nonce is a verdict": (grading, f"{GRADE}:_answer", without_nonce, POINT),
    "a verdict on anything is one": (grading, f"{GRADE}:_verdict", of_any_name, POINT),
    "exit code 0 is a pass": (grading, f"{GRADE}:Verdict", trusting, POINT),
    "the first that ends the process ends all": (grading, f"{GRADE}:_todo", until_one_has_ended, NEXT),
    "no time limit": (limiting, f"{GRADE}:LimitedProcess", Patient, HANGS),
    "no memory limit": (limiting, f"{LIMITED}:_memory", lambda *_: 0, MEMORY),
    "a shared page counts for each": (limiting, f"{LIMITED}:_memory", each_its_own, SHARED),
    "all that is printed is kept": (limiting, f"{GRADE}:LimitedProcess", KeepsAll, PRINTED),
    "the whole environment": (limiting, f"{LIMITED}:environment_without_secrets", lambda _: dict(os.environ),
                              SECRET),
    "orphans are not adopted": (ending, f"{LIMITED}:prctl", lambda *_: None, STAYS),
    "its children are left": (ending, f"{GRADE}:LimitedProcess", EndsItAlone, STAYS),
}
MUTANTS = [
    *(Mutant(name, each, patched(judged, target, wrong), rejected_by)
      for name, (each, target, wrong, rejected_by) in VARIANTS.items()
      if LINUX or rejected_by not in (SHARED, STAYS)),
    Mutant("the checker's own judge, as it is by then", judging,
           patched(in_place, "nanoinfra.lab.grading.judge_process:FunctionType", as_it_is), PATCHED),
    Mutant("an exit passes through", judging,
           patched(in_place, "nanoinfra.lab.check:judge_criterion", all_but_exits), LEAVES),
]
