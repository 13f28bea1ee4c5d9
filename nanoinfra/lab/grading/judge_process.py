"""The child process of `grade` that judges a hand-in. It writes a line of JSON for each criterion to a pipe.

If the hand-in ends or hangs this process, it loses the current criterion and the later ones of that check.
The hand-in runs in the same interpreter as the criteria: a file that searches memory for the pipe and the
nonce can forge its verdicts. Criteria and `judge_criterion` are bound before its first line runs, so that
accidents and plain tricks earn nothing; a line without the nonce is no verdict.
"""
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from types import FunctionType

from nanoinfra.lab import check, exercise
from nanoinfra.lab.check import Check, Verdict
from nanoinfra.lab.grading.limited_process import PR_SET_PDEATHSIG, prctl

_MAX_REASON_CHARACTERS = 16000  # of a verdict's text


def judge_file(checks: list[Check], file: str, displayed_file: str) -> Iterator[tuple[str, Verdict]]:
    """Judge the functions in `file`: yields (name of the check, verdict) as they come.

    A check ends with its first criterion that is not met. Messages call the file `displayed_file`.
    """
    tests = [(each.name, tuple(each.criteria)) for each in checks]
    # no patch of the module reaches it
    judge = FunctionType(check.judge_criterion.__code__, dict(vars(check)))
    for name, criteria in tests:
        subject = load_function_to_judge(file, name, displayed_file)
        for criterion in criteria:
            verdict = judge(criterion, subject)
            yield name, verdict
            if verdict.state == "wrong":
                break


def load_function_to_judge(file: str, name: str, displayed_file: str) -> Callable:
    """The function `name` of `file`, or one that raises CriterionNotMet to say why there is none."""
    try:
        return getattr(exercise.load_python_file(file), name)
    except (Exception, SystemExit) as error:           # a missing function costs its own points, no more
        reason = error

        def missing(*_, **__):
            raise check.CriterionNotMet(f"{displayed_file} gives no {name}: "
                                        f"{type(reason).__name__}: {reason}")
        return missing


def main() -> None:
    """Judge what stdin asks: {"lesson", "checks": names, "course", "file", "shown", "nonce", "pipe"}.

    The checks are imported from "course", the grader's folder: a `lessons` package of the hand-in never is.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ask = json.load(sys.stdin)
    with chdir(ask["course"]):
        checks = [each for each in check.load_lesson_checks(ask["lesson"]).CHECKS
                  if each.name in ask["checks"]]

    def say(**words):
        os.write(ask["pipe"], json.dumps({"nonce": ask["nonce"]} | words).encode() + b"\n")
    say(ready=True)
    for name, verdict in judge_file(checks, ask["file"], ask["shown"]):
        say(check=name, criterion=verdict.criterion.name, state=verdict.state,
            text=verdict.text[:_MAX_REASON_CHARACTERS])


if __name__ == "__main__":
    main()
