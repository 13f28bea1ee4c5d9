"""Every command that starts ranks on this host, watched from start to end: it listens on loopback alone."""
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import processes
from tests.distributed.sockets import (
    another_interface,
    beyond_loopback,
    family,
    listening,
    needs_linux,
    open_to_others,
)
from tests.serve import conftest
from tests.serve.host import PATIENCE, SERVE, until
from tests.train.runs import FLAGS, children, lines, wait_for

pytestmark = [needs_linux, pytest.mark.prove, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
model = conftest.model                       # the fixture
NANOINFRA = [sys.executable, "-m", "nanoinfra.cli"]
POOL = """
import time
import torch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
with RankPool(3) as pool:
    pool.run(lambda: comm.all_reduce(torch.ones(1), Mesh(dp=3).dp))
    pool.run(time.sleep, 1.0)                # to be looked at
"""


class Watch(threading.Thread):
    """Looks, until `end`, for sockets of process `pid` and all that descend from it."""

    def __init__(self, pid: int):
        super().__init__()
        self.pid, self.ended = pid, threading.Event()
        self.listened, self.open = set(), set()
        self.start()

    def run(self):
        while not self.ended.wait(0.1):
            pids = family(self.pid)
            try:
                self.listened |= set(listening(pids))
                self.open |= {*beyond_loopback(pids), *open_to_others(pids)}
            except (FileNotFoundError, ProcessLookupError):  # the command has ended
                return

    def end(self):
        self.ended.set()
        self.join()


@pytest.fixture
def watched(tmp_path):
    """Starts a command in a folder of its own; it must listen, and nowhere beyond loopback."""
    @contextmanager
    def watch(command):
        own = {"GLOO_SOCKET_IFNAME": another_interface(), "PYTHONPATH": str(ROOT)}
        with processes.started(command, env={**os.environ, **own}, cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True) as process:
            watch = Watch(process.pid)
            try:
                yield process
            finally:
                watch.end()
        assert len(watch.listened) >= 2 and watch.open == set(), f"{watch.open} of {watch.listened}"
    return watch


def end_well(process):
    assert process.wait(500) == 0, process.stderr.read()


@pytest.mark.parametrize("argv", [
    [*FLAGS, "--dp", "2"], [*FLAGS, "--dp", "2", "--tp", "2"], ["doctor", "--dp", "2", "--threads", "1"]],
    ids=["train --dp 2", "train --dp 2 --tp 2", "doctor --dp 2"])
def test_a_command_of_several_ranks(watched, argv):
    with watched([*NANOINFRA, *argv]) as process:
        end_well(process)


def test_a_run_that_is_started_again(watched, tmp_path):
    argv = [*FLAGS, "--steps", "99", "--save-every", "9", "--dp", "2", "--max-restarts", "1", "--out", "run"]
    with watched([*NANOINFRA, *argv]) as process:
        wait_for(lambda: lines(tmp_path / "run") >= 5, process)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        end_well(process)


def test_one_rank_that_may_be_started_again(watched):
    with watched([*NANOINFRA, *FLAGS, "--max-restarts", "1"]) as process:
        end_well(process)


def test_generate_on_two_ranks(watched, model):
    argv = ["generate", str(model), "one two", "--tp", "2", "--max-new-tokens", "100"]
    with watched([*NANOINFRA, *argv]) as process:
        end_well(process)


def test_a_server_of_two_ranks(watched, model):
    with watched([*SERVE, str(model), "--served-model-name", "tiny", "--tp", "2"]) as process:
        url = re.search(r"http://\S+\d", process.stderr.readline())[0]
        with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
            until(lambda: client.get("/health").status_code == 200)
            asked = {"model": "tiny", "prompt": "one two", "max_tokens": 8}
            assert client.post("/v1/completions", json=asked).status_code == 200
        process.send_signal(signal.SIGTERM)
        end_well(process)


def test_a_pool(watched):
    with watched([sys.executable, "-c", POOL]) as process:
        end_well(process)


def test_a_lab(watched, tmp_path):
    (tmp_path / "lessons").mkdir()
    argv = ["08", "--nproc", "2", "--model", "test"]
    with watched([sys.executable, "-m", "nanoinfra.lab.run_lab", *argv]) as process:
        end_well(process)
