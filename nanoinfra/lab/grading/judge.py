"""The process in which `grade` has a hand-in judged: a line of JSON for each criterion, on a pipe.

What ends or hangs this process costs the criterion that was asked and the later ones of its check. Not held:
the hand-in runs in the same interpreter as the criteria, so a file that replaces what they call, or finds the
pipe and the nonce in memory, can forge its verdicts. Against accidents and plain tricks the criteria and
`judge` are taken before its first line runs, and a line without the nonce is no verdict.
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

_MAX_REASON_CHARACTERS = 16000  # characters of a reason that are passed on


def judge_file(checks: list[Check], file: str, shown: str) -> Iterator[tuple[str, Verdict]]:
    """(name of the check, verdict) as they come: of each check up to the first criterion that is not met.

    `shown` is what messages call the file.
    """
    tests = [(each.name, tuple(each.criteria)) for each in checks]
    # no patch of the module reaches it
    judge = FunctionType(check.judge_criterion.__code__, dict(vars(check)))
    for name, criteria in tests:
        subject = load_function_to_judge(file, name, shown)
        for criterion in criteria:
            verdict = judge(criterion, subject)
            yield name, verdict
            if verdict.state == "wrong":
                break


def load_function_to_judge(file: str, name: str, shown: str) -> Callable:
    """The function `name` of `file`, or one that says why there is none."""
    try:
        return getattr(exercise.load_python_file(file), name)
    except (Exception, SystemExit) as error:           # a missing function costs its own points, no more
        reason = error

        def missing(*_, **__):
            raise check.CriterionNotMet(f"{shown} gives no {name}: {type(reason).__name__}: {reason}")
        return missing


def main() -> None:
    """Judge what stdin asks: {"lesson", "checks": names, "course", "file", "shown", "nonce", "pipe"}.

    The checks are those of "course", the folder of who grades; no `lessons` of the hand-in is ever imported.
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
