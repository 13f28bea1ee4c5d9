"""A program that is not trusted: what it may take, and that nothing of it stays."""
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nanoinfra.lab.grading.limited_process import LimitedProcess, ProcessGaveNoLine, ProcessLimits

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks for /proc and for a subreaper")
BEGIN = """
import json, os, signal, subprocess, sys, time
ask = json.load(sys.stdin)
def say(text):
    os.write(ask["pipe"], text.encode())
"""
FAMILY = """
say(f"{subprocess.Popen(['sleep', '1000']).pid}\\n")
say(f"{subprocess.Popen(['sleep', '1000'], start_new_session=True).pid}\\n")
if os.fork() == 0:
    say(f"{os.getpid()}\\n")
    os.kill(os.getpid(), signal.SIGSTOP)
if os.fork() == 0:
    os.setsid()                                        # out of its group and session,
    if os.fork():
        os._exit(0)                                    # and nobody's child
    say(f"{os.getpid()}\\n")
    time.sleep(1000)
"""


def program(code, **limits):
    return LimitedProcess([sys.executable, "-I", "-c", BEGIN + code], {"word": "here"},
                          ProcessLimits(**limits))


def test_it_is_asked_and_answers_in_lines():
    with program("say(ask['word'] + chr(10) + 'second' + chr(10))") as started:
        assert [started.read_line(), started.read_line()] == [b"here", b"second"]


@pytest.mark.parametrize("code, why", [
    ("sys.exit(0)", "ended its process with exit code 0, which is no answer"), ("sys.exit(3)", "exit code 3"),
    ("os._exit(0)", "exit code 0"), ("say('no end of line')", "exit code 0"),
    ("os.close(ask['pipe'])", "exit code 0"), ("say('x' * 3000); time.sleep(1000)", "wrote more than 2,000"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "ended its process by SIGKILL"),
])
def test_what_is_no_line_ends_with_a_reason(code, why):
    with program(code, line_bytes=2000) as started, pytest.raises(ProcessGaveNoLine, match=why):
        started.read_line()


@pytest.mark.parametrize("code", [
    "while True: pass", "os.kill(os.getpid(), signal.SIGSTOP)",
    "os.close(ask['pipe']); os.close(1); os.close(2); time.sleep(1000)"])
def test_what_hangs_ends(code):
    with program(code, seconds_per_line=0.6) as started, pytest.raises(ProcessGaveNoLine,
                                                                       match="within 0.6 s"):
        started.read_line()


def test_memory_counts_what_it_started():
    hog = "import time; mine = bytearray(300 << 20); time.sleep(1000)"
    with program(f"subprocess.run([sys.executable, '-c', {hog!r}])", memory_bytes=200 << 20) as started:
        with pytest.raises(ProcessGaveNoLine, match="MiB of memory, more than 200"):
            started.read_line()


@linux
def test_memory_that_several_share_counts_once():
    shares = """
mine = bytearray(100 << 20)
if all(os.fork() for _ in range(4)):
    time.sleep(1)                                      # so that it is looked at
    say("done\\n")
time.sleep(1000)
"""
    with program(shares, memory_bytes=300 << 20) as started:
        assert started.read_line() == b"done"


@linux
def test_no_process_of_it_stays_and_others_do():
    with subprocess.Popen(["sleep", "1000"]) as other:
        with program(FAMILY + "time.sleep(1000)") as started:
            pids = [int(started.read_line()) for _ in range(4)]
            assert all(map(psutil.pid_exists, pids))
        assert not any(map(psutil.pid_exists, pids)) and other.poll() is None
        other.kill()


@linux
def test_a_program_that_forks_on_and_on_ends():
    forks = "for _ in range(6):\n    os.fork()\nsay('.')\nwhile True:\n    os.fork() or os._exit(0)\n"
    before = set(psutil.Process().children(recursive=True))
    with program(forks) as started, pytest.raises(ProcessGaveNoLine, match="more than 500 processes"):
        started.read_line()
    assert set(psutil.Process().children(recursive=True)) <= before


def test_what_it_prints_is_read_and_the_beginning_kept():
    code = "for _ in range(100):\n    print('x' * (1 << 20), end='')\n    sys.stdout.flush()\nsay('done\\n')"
    with program(code, kept_output_bytes=10) as started:
        assert started.read_line() == b"done"
    assert started.captured_output == "xxxxxxxxxx ... (104,857,600 bytes in all)"


def test_it_runs_in_a_folder_of_its_own_and_sees_no_secret(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    code = "open('mine', 'w').close(); say(f'{os.getcwd()}\\n'); say(f'{sorted(os.environ)}\\n')"
    with program(code) as started:
        folder, names = Path(started.read_line().decode()), started.read_line().decode()
    assert folder != Path.cwd() and not folder.exists()
    assert "SOME_API_KEY" not in names and "'PATH'" in names and "'TMPDIR'" in names
