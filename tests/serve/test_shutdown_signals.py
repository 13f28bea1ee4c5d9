"""SIGTERM and Ctrl-C, whenever they come: the process ends with 0 in time, without a traceback, all of it."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoinfra.serve.processes.engine_loop import API_SIGNALS, EngineReady
from nanoinfra.serve.processes.engine_processes import EngineProcesses
from nanoinfra.serve.server.http.exit_with_0_on_signals import SHUTDOWN_SIGNALS, exit_zero_on_shutdown_signals
from tests.processes import alive, children, descendants
from tests.serve.fake import compiling, fake, meeting
from tests.serve.host import ROOT, SERVE, running, started, until

DRAIN, MARGIN = 0.5, 60.0                    # seconds; the second for a machine that is busy


def to_all(pid, sign):
    """As systemd sends SIGTERM, and a terminal Ctrl-C."""
    for each in (*descendants(pid), pid):
        os.kill(each, sign)


SIGNALS = {"SIGTERM": (os.kill, signal.SIGTERM), "SIGTERM to all": (to_all, signal.SIGTERM),
           "Ctrl-C": (to_all, signal.SIGINT)}


def every(*quick):
    """All signals as parameters; but for `quick` under make prove."""
    return pytest.mark.parametrize("sign", [
        pytest.param(how, id=name, marks=[] if name in quick else [pytest.mark.prove])
        for name, how in SIGNALS.items()])


def ends(process, sign):
    """The signal, and then the end: code 0 in time, no process left, no traceback."""
    ranks, (send, which) = descendants(process.pid), sign
    send(process.pid, which)
    yield                                    # for what clients see meanwhile
    assert process.wait(DRAIN + MARGIN) == 0
    assert ranks and not any(map(alive, ranks))
    assert "Traceback" not in process.stderr.read()


@every("SIGTERM to all")
def test_while_ranks_begin(sign):
    with running(2, DRAIN, load=600, ready=False) as (process, _):
        until(lambda: len(children(process.pid)) == 2)
        list(ends(process, sign))


@every("Ctrl-C")
def test_while_it_loads(sign):
    """Each rank waits for a program that it has started: nothing of that is left either."""
    with running(2, DRAIN, compiling, ready=False) as (process, _):
        until(lambda: len(descendants(process.pid)) == 4)
        list(ends(process, sign))


@every("SIGTERM")
def test_idle_and_again_while_it_ends(sign):
    with running(1, DRAIN) as (process, _):
        for _ in ends(process, sign):
            while process.poll() is None:
                sign[0](process.pid, sign[1])
                time.sleep(0.01)


@every("Ctrl-C")
@pytest.mark.parametrize("stopped", [pytest.param(None, marks=pytest.mark.prove, id="working"), 0, 1])
def test_while_it_streams(sign, stopped):
    """Also with a rank of two that SIGSTOP has stopped: it obeys no other signal."""
    body = {"prompt": "hello ", "max_tokens": 500, "stream": True}
    with (running(2, DRAIN, meeting, pause=0.02) as (process, client),
          client.stream("POST", "/v1/completions", json=body) as response):
        lines = (line for line in response.iter_lines() if line)
        assert "h" in next(lines)
        if stopped is not None:
            os.kill(children(process.pid)[stopped], signal.SIGSTOP)
        for _ in ends(process, sign):
            *_, error, done = lines
            assert "the server ends" in json.loads(error.removeprefix("data: "))["error"]["message"]
            assert done == "data: [DONE]"


@pytest.mark.prove
@every()
@pytest.mark.parametrize("stopped", [None, 1])
def test_the_real_engine_while_it_streams(model, sign, stopped):
    """Its ranks wait for each other in a collective, and none says that it has lost another."""
    body = {"prompt": "one two", "max_tokens": 100, "stream": True, "ignore_eos": True}
    flags = ["--served-model-name", "tiny", "--tp", "2", "--kv-memory", "1MiB", "--shutdown-timeout", "0.1"]
    with (started([*SERVE, str(model), *flags]) as (process, client),
          client.stream("POST", "/v1/completions", json=body) as response):
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        if stopped is not None:
            os.kill(children(process.pid)[stopped], signal.SIGSTOP)
        for _ in ends(process, sign):
            assert [*lines][-1] == "data: [DONE]"            # with all of it, or an error


@pytest.mark.prove
@every()
def test_stopped_and_idle(sign):
    with running(1, DRAIN) as (process, _):
        os.kill(*children(process.pid), signal.SIGSTOP)
        list(ends(process, sign))


@pytest.mark.parametrize("sign", SHUTDOWN_SIGNALS)
@pytest.mark.parametrize("when", ["in", "after"])
def test_without_a_server_it_ends_at_once(sign, when):
    """Before one is there, while packages are imported, and when it has ended."""
    wait = "print('here', flush=True); time.sleep(600)"
    code = ("import time\n"
            "from nanoinfra.serve.server.http.exit_with_0_on_signals import exit_zero_on_shutdown_signals\n"
            "@exit_zero_on_shutdown_signals\ndef main():\n"
            f"    {wait if when == 'in' else 'pass'}\nmain()\n{wait}")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "here\n"
            process.send_signal(sign)
            assert process.wait(MARGIN) == 0 and process.stderr.read() == ""
        finally:
            process.kill()


def test_a_mistake_gives_the_signals_back():
    @exit_zero_on_shutdown_signals
    def main():
        assert all(signal.getsignal(each) is not before[each] for each in SHUTDOWN_SIGNALS)
        raise ValueError("no such flag")
    before = {each: signal.getsignal(each) for each in SHUTDOWN_SIGNALS}
    with pytest.raises(ValueError, match="no such flag"):
        main()
    assert {each: signal.getsignal(each) for each in SHUTDOWN_SIGNALS} == before


def test_a_rank_ignores_them_from_its_first_moment(capfd):
    life = EngineProcesses(fake, 1)
    try:
        for _ in range(3):
            for sign in SHUTDOWN_SIGNALS:
                os.kill(life.processes[0].pid, sign)         # while it imports
        news, = life.receive_messages()
        assert isinstance(news, EngineReady)
        status = Path(f"/proc/{life.processes[0].pid}/status").read_text()
        masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
        bits = sum(1 << each - 1 for each in API_SIGNALS)
        assert int(masks["SigIgn"], 16) & bits == bits and int(masks["SigBlk"], 16) & bits == 0
    finally:
        life.kill_all()
        life.kill_and_wait()
    assert capfd.readouterr().err == ""


def test_a_rank_whose_parent_died_before_it_could_ask_ends():
    code = ("import functools, os, signal\n"
            "from nanoinfra.serve.processes.engine_processes import EngineProcesses\n"
            "from tests.serve.fake import fake\n"
            "life = EngineProcesses(functools.partial(fake, load=600), 2)\n"
            "print(*[each.pid for each in life.processes], flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        ranks = [int(each) for each in parent.stdout.readline().split()]     # its end would be theirs
    try:
        assert len(ranks) == 2
        until(lambda: not any(map(alive, ranks)))
    finally:
        for pid in filter(alive, ranks):
            os.kill(pid, signal.SIGKILL)
