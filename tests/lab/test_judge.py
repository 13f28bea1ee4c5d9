"""Hand-ins that would rather not be judged: none earns a point or hangs, and no process of theirs stays."""
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from nanoinfra.lab import check
from nanoinfra.lab.grading import judge_process
from nanoinfra.lab.grading.grade_lesson import grade_lesson
from nanoinfra.lab.grading.limited_process import ProcessLimits

NAMES = "ring_reduce_scatter", "ring_all_reduce"       # of lesson 02, whose criteria start rank processes
PATCHES = """
import os, sys
check = sys.modules["nanoinfra.lab.check"]
check.CriterionNotMet = check.CriterionBlocked = type("Never", (Exception,), {})
check.Verdict = lambda criterion, *_: criterion
check.judge_criterion = check.Check.report = lambda criterion, *_: check.Verdict(criterion, "pass")
"""
EVERYWHERE = """
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'{"state": "pass"}\\n')
    except OSError:
        pass
"""
ESCAPES = """
import subprocess, sys, time
LEFT = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(1000)"
subprocess.run([sys.executable, "-c", LEFT, "left-by-a-hand-in"])
"""
HAND_INS = {                                           # {name: (what is handed in, why it scores nothing)}
    "leaves at import": ("import sys; sys.exit(0)", "SystemExit: 0"),
    "ends the process at import": ("import os; os._exit(0)", "exit code 0, which is no answer"),
    "leaves": ("import sys\ndef f(*_): sys.exit(0)", "SystemExit: 0"),
    "ends the process": ("import os\ndef f(*_): os._exit(0)", "exited with code 0"),       # a rank's
    "leaves in a thread": ("from threading import Thread\n"
                           "def f(*_): each = Thread(target=exit, args=[0]); each.start(); each.join()",
                           "rank 0"),
    "interrupts": ("def f(*_): raise KeyboardInterrupt", "KeyboardInterrupt"),
    "hangs": ("def f(*_):\n    while True: pass", "gave no answer within"),
    "hangs at import": ("while True: pass", "gave no answer within 20 s"),
    "takes memory": ("HELD = []\nwhile True: HELD.append(bytearray(16 << 20))", "MiB of memory, more"),
    "prints on": ("print('score 10 of 10\\n' * (8 << 20))", "bytes in all"),
    "patches the checker": (PATCHES + "def f(x, axis): return x", "rank 0"),
    "writes everywhere": (PATCHES + EVERYWHERE, "wrote what is no verdict"),
    "starts others": (ESCAPES + "def f(*_): time.sleep(1000)", "gave no answer within"),
}


@pytest.fixture
def toy():
    even = check.Check("even")

    @even.criterion("is even", "property")
    def _(subject):
        if subject() % 2:
            raise check.CriterionNotMet("odd")
    return even


@pytest.mark.parametrize("code, why", [
    (PATCHES + "def even(): return 1", "odd"),
    (HAND_INS["leaves at import"][0], "gives no even: SystemExit: 0"),
    ("def even(): raise SystemExit(0)", "SystemExit: 0"),
    ("def odd(): return 2", "gives no even: AttributeError"),
])
def test_leaving_or_patching_the_checker_is_no_point(monkeypatch, tmp_path, toy, code, why):
    for name in ("CriterionNotMet", "CriterionBlocked", "Verdict", "judge_criterion"):
        monkeypatch.setattr(check, name, getattr(check, name))         # what the file does to it is undone
    monkeypatch.setattr(check.Check, "report", check.Check.report)
    (tmp_path / "L98.py").write_text(code)
    (got,) = judge_process.judge_file([toy], str(tmp_path / "L98.py"), "L98.py")
    assert (got[0], got[1].state) == ("even", "wrong") and why in got[1].text


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", HAND_INS)
def test_a_hostile_hand_in_scores_nothing_and_leaves_nothing(course, capsys, name):
    code, why = HAND_INS[name]
    before = set(psutil.Process().children(recursive=True))
    limits = ProcessLimits(seconds_per_line=20 if name == "hangs at import" else 180, memory_bytes=1500 << 20)
    assert grade_lesson("02", hand_in(course, code), limits=limits) == 1
    out = capsys.readouterr().out
    assert out.count("\nscore") == 1 and "\nscore 0 of" in out and why in out and len(out) < 30_000
    assert set(psutil.Process().children(recursive=True)) <= before and not left()


@pytest.mark.prove
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_grading_that_is_stopped_leaves_nothing(course, number):
    hand_in(course, HAND_INS["starts others"][0])
    command = [sys.executable, "-m", "nanoinfra.lab.grading.grade_lesson", "02"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as grading:
        try:
            while not left():
                assert grading.poll() is None
                time.sleep(0.1)
            family = psutil.Process(grading.pid).children(recursive=True)
            grading.send_signal(number)
            assert grading.wait() in (128 + number, -number)
        finally:
            grading.kill()
    assert not any(each.is_running() for each in family) and not left()


def hand_in(course, text):
    (course / "work").mkdir()
    file = course / "work" / "L02.py"
    file.write_text(text + "".join(f"\nif 'f' in globals(): {name} = f" for name in NAMES) + "\n")
    return file


def left():
    return [each for each in psutil.process_iter(["cmdline"])
            if "left-by-a-hand-in" in (each.info["cmdline"] or []) and each.pid != os.getpid()]
