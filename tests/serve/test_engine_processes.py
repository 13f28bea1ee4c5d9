"""An engine that takes nothing, says nothing, or does not die: the event loop goes on, memory is bounded."""
import asyncio
import functools
import os
import signal
import socket
import struct
import sys
import threading
from pathlib import Path

import pytest

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.processes import engine_client as module
from nanoinfra.serve.processes.engine_client import _SILENT_TICKS_UNTIL_HUNG, EngineClient
from nanoinfra.serve.processes.engine_loop import MIN_IN_FLIGHT
from nanoinfra.serve.processes.engine_processes import EngineProcesses, ProcessDied
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests.serve.fake import fake
from tests.serve.host import serving, until
from tests.serve.test_engine_client import ids, pids, reaches, said, working

LARGE = {"context": 1 << 18, "blocks": 1 << 15}              # 100 kB of a prompt are 100,000 tokens


async def empty(worker):
    async with asyncio.timeout(60):
        while worker.untaken_tokens or worker.stats["blocks_used"]:
            await asyncio.sleep(0.005)


async def answers(worker):
    assert await said(worker.submit_requests([Request("after", ids("ab"), max_tokens=2)])) == {("after",
                                                                                                0): "ab"}


def test_a_stopped_engine_keeps_nobody_waiting():
    """Prompts of more than a pipe holds: as many as may wait do, the others are told; given up, none is."""
    async def run():
        async with working(**LARGE) as worker:
            pid, = pids(worker)
            os.kill(pid, signal.SIGSTOP)
            jobs = [worker.submit_requests([Request(f"r{i}", [7] * 100_000)]) for i in range(64)]
            assert len(worker.streams) == MIN_IN_FLIGHT[1] // 100_000 == len(worker.untaken_tokens)
            with pytest.raises(APIError, match="10 of 1000000 tokens wait for it") as refused:
                await said(jobs[-1])
            assert refused.value.status_code == 429
            for job in jobs:
                job.close()
            os.kill(pid, signal.SIGCONT)
            await empty(worker)
            await answers(worker)
    asyncio.run(run())


def test_commands_that_wait_are_bounded():
    async def run():
        async with working() as worker:
            pid, = pids(worker)
            os.kill(pid, signal.SIGSTOP)
            for i in range(3 * MIN_IN_FLIGHT[0]):
                worker.submit_requests([Request(f"r{i}", ids("ab"))]).close()
            assert MIN_IN_FLIGHT[0] <= len(worker.untaken_tokens) < 2 * MIN_IN_FLIGHT[0]
            assert worker.processes.commands.qsize() <= 2 * MIN_IN_FLIGHT[0]
            with pytest.raises(APIError, match="takes no requests now") as refused:
                worker.reset_prefix_cache()
            assert refused.value.status_code == 429
            os.kill(pid, signal.SIGCONT)
            await empty(worker)
            worker.reset_prefix_cache()
            await answers(worker)
    asyncio.run(run())


def test_health_answers_while_64_clients_ask_a_stopped_engine():
    """17 of their prompts may wait for it. 30 s are for a busy machine: what hangs, hangs for ever."""
    body = b'{"prompt": "%s"}' % (b"a" * 60_000)     # of larger bodies the API itself takes few at once
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(**LARGE) as (client, server):
        where = server.servers[0].sockets[0].getsockname()
        os.kill(*pids(server.engine_client), signal.SIGSTOP)
        clients = [socket.create_connection(where) for _ in range(64)]
        try:
            for each in clients:
                each.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            streams = server.engine_client.streams
            until(lambda: len(streams) == 17 and client.get("/health").status_code == 200)
            waits = [each for each in clients if not _answered(each)]
            assert client.get("/health").status_code == 200
            until(lambda: sum(map(_answered, clients)) == 47)
            assert len(waits) >= 17
        finally:
            for each in clients:
                each.close()


def _answered(client):
    client.setblocking(False)
    try:
        return client.recv(99, socket.MSG_PEEK).startswith(b"HTTP/1.1 429")
    except BlockingIOError:
        return False


class Silent:
    """A life that says nothing, and writes down how it ends."""

    def __init__(self):
        self.ends = []

    def send_command(self, command):
        pass

    def kill_all(self, why=""):
        self.ends.append(why)


def test_only_an_engine_with_work_hangs():
    async def run():
        worker = EngineClient(fake, ServerMetrics("fake"), hang_timeout=3600.0)
        worker.loop, worker.processes = asyncio.get_running_loop(), Silent()
        for work in ("streams", "untaken_tokens"):
            for _ in range(3 * _SILENT_TICKS_UNTIL_HUNG):
                worker._tick()
            setattr(worker, work, {"a": None})
            for _ in range(_SILENT_TICKS_UNTIL_HUNG):
                worker._tick()
            assert worker.processes.ends == []    # however long it was idle
            worker._tick()
            assert worker.processes.ends.pop() == "the engine has said nothing for 3600 s"
            setattr(worker, work, {})
        worker.timer.cancel()
    asyncio.run(run())


def test_an_engine_that_was_stopped_while_idle_is_started_again():
    async def run():
        async with working(hung=0.3) as worker:
            os.kill(*pids(worker), signal.SIGSTOP)
            await asyncio.sleep(0.5)
            assert worker.state == "ready"
            with pytest.raises(APIError, match="said nothing for 0.3 s"):
                await said(worker.submit_requests([Request("a", ids("ab"))]))
            await reaches(worker, "ready")
    asyncio.run(run())


def halfway(team):
    os.write(int(sys.argv[2]), struct.pack("!i", 1000) + b"the beginning")
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_was_stopped_while_it_spoke_can_be_ended():
    """Whoever hears it waits for the rest of a message."""
    life, heard = EngineProcesses(halfway, 1), []

    def hear():
        try:
            life.receive_messages()
        except ProcessDied as dead:
            heard.append(str(dead))
    thread = threading.Thread(target=hear)
    thread.start()
    until(lambda: Path(f"/proc/{life.processes[0].pid}/stat").read_text().split()[2] == "T")
    life.kill_all("it is silent")
    thread.join(60)
    life.kill_and_wait()
    assert heard == ["it is silent"]


def test_what_cannot_be_killed_is_left_and_said(monkeypatch, capsys):
    """As a process is that waits for a disk."""
    monkeypatch.setattr(module, "_KILL_TIMEOUT_SECONDS", 0.1)
    end, released = EngineProcesses.kill_and_wait, threading.Event()
    monkeypatch.setattr(EngineProcesses, "kill_and_wait", lambda life: (released.wait(60), end(life)))
    monkeypatch.setattr(EngineProcesses, "kill_all", lambda life, why="": None)

    async def run():
        worker = EngineClient(fake, ServerMetrics("fake"))
        worker.start()
        await reaches(worker, "ready")
        worker.stop()
        await worker.join()
        assert f"process {pids(worker)[0]}\n" in capsys.readouterr().err
        monkeypatch.undo()
        worker.newest_processes.kill_all()
        released.set()
        await worker.join()
    asyncio.run(run())


def test_an_end_while_it_loads_is_no_failure():
    async def run():
        worker = EngineClient(functools.partial(fake, load=600), ServerMetrics("fake"), 2)
        worker.start()
        async with asyncio.timeout(60):
            while not worker.newest_processes:
                await asyncio.sleep(0.005)
        worker.stop()
        await worker.join()
        await asyncio.sleep(0)
        assert (worker.state, worker.load_error) == ("stopped", "")
    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_keeper_is_an_engine_that_cannot_be_had(monkeypatch):
    """And not one that loads for ever."""
    async def run():
        worker = EngineClient(fake, ServerMetrics("fake"))
        worker.start()
        await reaches(worker, "failed")
        assert "cannot be kept running" in worker.load_error
        worker.stop()
        await worker.join()
    monkeypatch.setattr(module, "EngineProcesses", None)
    asyncio.run(run())


def test_pauses_grow_only_between_lives_that_served_nobody(monkeypatch):
    """Each letter is a life: d(ies while it loads), r(eady, no more), s(erved)."""
    lives, pauses = iter("s" + "d" * 8 + "sds" + "rr"), []

    class Short:
        def __init__(self, factory, world):
            self.how = next(lives, "")
            self.loaded, self.has_stepped = self.how in "rs", self.how == "s"

        def receive_messages(self):
            raise ProcessDied("it died")

        def kill_and_wait(self):
            if not self.how:
                worker.stop_requested.set()

    async def run():
        worker.loop, wait = asyncio.get_running_loop(), worker.stop_requested.wait
        monkeypatch.setattr(worker.stop_requested, "wait", lambda pause: pauses.append(pause) or wait(0))
        worker._keep_running()
    monkeypatch.setattr(module, "EngineProcesses", Short)
    worker = EngineClient(fake, ServerMetrics("fake"))
    asyncio.run(run())
    assert [round(pause, 2) for pause in pauses[:-1]] == [
        0, 0, 0.1, 0.3, 0.7, 1.5, 3.1, 5, 5, 5, 0, 0.1, 0, 0.1, 0.3]
