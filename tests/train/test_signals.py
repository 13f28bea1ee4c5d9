"""SIGINT, SIGTERM and SIGHUP: a run saves and says where, all else ends at once with one line."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoinfra.cli import main
from nanoinfra.train import metrics_and_plots, trainer
from nanoinfra.train.checkpoint import save_and_load
from nanoinfra.train.launch import stop_signals
from nanoinfra.train.launch.stop_message import resume_command
from nanoinfra.train.launch.stop_signals import (
    _SAME_SIGNAL_SECONDS,
    TERMINATION_SIGNALS,
    SignalListener,
    StopRequest,
)
from tests.processes import until

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["train", "--model", "test", "--data", "random", "--seq", "8", "--micro-batch", "2", "--threads", "1"]


one = pytest.mark.parametrize("sign", [
    pytest.param(each, id=each.name, marks=pytest.mark.prove if i
                 else []) for i, each in enumerate(TERMINATION_SIGNALS)])


@pytest.fixture
def heard():
    """What a SignalListener hears, which stands for the process's own."""
    said = []
    hearing = SignalListener(said.append)
    hearing.start()
    yield said
    hearing.stop()


@pytest.fixture
def request_(heard):
    asked = StopRequest(is_single_process=True)
    asked.start()
    yield asked
    asked.stop()


@pytest.mark.parametrize("sign", TERMINATION_SIGNALS)
def test_the_first_signal_asks_and_says_so_at_once(capfd, heard, request_, sign, monkeypatch):
    monkeypatch.setattr(stop_signals, "_SAME_SIGNAL_SECONDS",
                        3600.0)             # however slow the machine is
    os.kill(os.getpid(), sign)
    until(lambda: request_.requested)
    assert heard == []
    time.sleep(0.05)
    assert capfd.readouterr().err.strip().startswith(f"nanoinfra: {sign.name}: the run stops after this step")
    os.kill(os.getpid(), sign)               # at once: `timeout` and terminals send it twice
    time.sleep(0.05)
    assert request_.requested == 1 and heard == []


@pytest.mark.parametrize("sign", TERMINATION_SIGNALS)
def test_a_second_one_goes_to_the_process(heard, request_, sign):
    """But not a second SIGHUP, of which a terminal that is closed sends several."""
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: request_.requested)
    request_.requested_at -= _SAME_SIGNAL_SECONDS
    os.kill(os.getpid(), sign)
    if sign != signal.SIGHUP:
        until(lambda: heard == [sign])
    else:
        time.sleep(0.05)
        assert heard == []


def test_in_a_program_that_calls_train_a_second_ctrl_c_is_pythons():
    asked = StopRequest(is_single_process=True)
    before = signal.getsignal(signal.SIGINT)
    asked.start()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: asked.requested)
        asked.requested_at -= _SAME_SIGNAL_SECONDS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(6000):
                time.sleep(0.01)
    finally:
        asked.stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_rank_takes_any_number_of_signals_as_one(heard):
    asked = StopRequest(is_single_process=False)
    asked.start()
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: asked.requested)
    asked.requested_at -= _SAME_SIGNAL_SECONDS
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)
    asked.stop()
    assert asked.requested == 1 and heard == []


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asked = StopRequest(is_single_process=True)
        asked.start()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        asked.stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("given, want", [
    ("train --out x", "nanoinfra train --out x --resume"),
    ("train --resume --out x", "nanoinfra train --resume --out x"),
    ("train --resume-from 4 --out x", "nanoinfra train --out x --resume"),
    ("train --resume-from=4 --resume", "nanoinfra train --resume")])
def test_the_command_that_goes_on_does_not_go_back(given, want):
    assert resume_command(given.split()) == want


@one
def test_a_run_on_one_rank_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capfd, sign):
    execute, calls = trainer.execute_schedule, []

    def signalled(*args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), sign)
        return execute(*args)
    monkeypatch.setattr(trainer, "execute_schedule", signalled)
    monkeypatch.setattr(stop_signals, "redirect_terminal_to_devnull", lambda: None)         # pytest's
    argv = [*QUICK, "--steps", "100000", "--out", str(tmp_path)]
    assert main(argv) == 0
    step = len(metrics_and_plots.read_metrics(tmp_path / "metrics.jsonl"))
    asked, stopped = capfd.readouterr().err.splitlines()
    saved = save_and_load.find_newest_checkpoint(tmp_path / "checkpoints")
    assert saved.name == f"step_{step:08d}" and 3 <= step < 1000
    assert asked.startswith(f"nanoinfra: {sign.name}: the run stops after this step and is saved")
    assert stopped == (f"nanoinfra: stopped after step {step}; saved in {saved}; go on with: "
                       f"nanoinfra {' '.join(argv)} --resume")


STUB = """
import sys, time
from nanoinfra import cli, parse_and_run_command
def run_command(argv):
    print("here", flush=True)
    {wait}
    return 0
parse_and_run_command.run_command = run_command
cli.run()
"""
IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"


@one
def test_a_command_that_has_nothing_to_save_ends_at_once(sign):
    """Also while it is in C code, where Python's own handlers never come to run."""
    with stub(IN_C) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(sign)
        assert process.wait(60) == 128 + sign
        assert process.stderr.read() == f"nanoinfra: stopped by {sign.name}\n"


def test_who_reads_no_more_ends_a_command_without_a_word():
    with stub("print('x' * 10**6)") as process:
        assert process.stdout.readline() == "here\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (128 + signal.SIGPIPE, "")


def test_a_run_goes_on_where_nobody_reads_it():
    lasts = "print('x' * 10**6, flush=True); print('y', flush=True); print('end', file=sys.stderr)"
    with stub(lasts, "train") as process:
        assert process.stdout.readline() == "here\n"
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == "nanoinfra: stdout is gone (Broken pipe); the run goes on\nend\n"


def test_closed_streams_and_a_narrow_encoding_end_nothing(tmp_path):
    """`>&- 2>&-`: else the next files that are opened would be stdout and stderr."""
    code = STUB.format(wait="print(chr(0x20ac), flush=True); print(open(sys.argv[2], 'w').fileno() > 2)")
    for shell, want in (('exec "$@" >&- 2>&-', ""), ('exec "$@"', "here\n\\u20ac\nTrue\n")):
        argv = ["bash", "-c", shell, "-", sys.executable, "-c", code, "train", str(tmp_path / "file")]
        done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"},
                              capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, want, "")


def stub(wait, *argv, **more):
    """A process of the command line whose command is `wait`."""
    return subprocess.Popen([sys.executable, "-c", STUB.format(wait=wait), *argv], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
