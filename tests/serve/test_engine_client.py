"""The engine's processes: they start, die and start again, and whoever waits hears of it."""
import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.processes.engine_client import EngineClient
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests.processes import alive
from tests.serve.fake import Fake, fake, text

ROOT = Path(__file__).resolve().parents[2]


def ids(said):
    return text().encode(said)


def following(team, **options):
    """A fake engine whose step waits for all ranks, as a collective does."""
    engine = Fake(**options)
    step = engine.step

    def together():
        team.broadcast_object()
        return step()
    engine.step = together
    return engine


def unloadable(team):
    raise ValueError("no such model; name another")


def crashing(team):
    os._exit(7)


@contextlib.asynccontextmanager
async def working(factory=fake, world=1, hung=300.0, **options):
    worker = EngineClient(functools.partial(factory, **options), ServerMetrics("fake"), world, hung)
    worker.start()
    try:
        await reaches(worker, "ready", "failed")
        yield worker
    finally:
        worker.stop()
        await worker.join()


async def reaches(worker, *states):
    async with asyncio.timeout(60):
        while worker.state not in states:
            await asyncio.sleep(0.005)


async def said(job):
    texts = {}
    async for event in job:
        texts[event.request_id, event.index] = texts.get((event.request_id, event.index), "") + event.text
    return texts


def pids(worker):
    return [process.pid for process in worker.processes.processes]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_answer_together(world):
    async def run():
        async with working(following, world) as worker:
            got = await said(worker.submit_requests([Request("a", ids("ab"), max_tokens=4, n=2),
                                                     Request("b", ids("xyz"), max_tokens=2)]))
            assert got == {("a", 0): "abab", ("a", 1): "abab", ("b", 0): "xy"}
            assert not worker.streams and worker.stats["blocks_used"] == 0
            return pids(worker)
    left = asyncio.run(run())
    assert len(left) == world and not any(map(alive, left))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_is_an_error_and_a_restart(rank):
    async def run():
        async with working(following, 2, pause=0.01) as worker:
            job = worker.submit_requests([Request("a", ids("ab"), max_tokens=400)])
            await anext(job)
            before = pids(worker)
            os.kill(before[rank], signal.SIGKILL)
            with pytest.raises(APIError, match="of the engine") as refused:
                await said(job)
            assert refused.value.status_code == 503 and worker.state == "restarting"
            with pytest.raises(APIError, match="of the engine"):
                worker.submit_requests([Request("b", ids("ab"))])
            await reaches(worker, "ready")
            assert await said(worker.submit_requests([Request("c", ids("ab"), max_tokens=2)])) == {("c",
                                                                                                    0): "ab"}
            assert not any(map(alive, before))
    asyncio.run(run())


def test_a_rank_that_hangs_is_started_again():
    async def run():
        async with working(following, 2, hung=0.3, pause=0.01) as worker:
            job = worker.submit_requests([Request("a", ids("ab"), max_tokens=400)])
            os.kill(pids(worker)[1], signal.SIGSTOP)
            with pytest.raises(APIError, match="said nothing for 0.3 s"):
                await said(job)
            await reaches(worker, "ready")
    asyncio.run(run())


def test_an_idle_engine_does_not_hang():
    async def run():
        async with working(hung=0.05) as worker:
            before = pids(worker)
            await asyncio.sleep(0.3)
            assert worker.state == "ready" and pids(worker) == before
    asyncio.run(run())


@pytest.mark.parametrize("factory, says", [
    (unloadable, "no such model; name another"), (crashing, "ended with 7"),
    (lambda team: None, "could not be started: Can't pickle")])
def test_an_engine_that_cannot_be_loaded_is_not_tried_twice(factory, says):
    async def run():
        async with working(factory) as worker:
            assert worker.state == "failed" and says in worker.load_error
            with pytest.raises(APIError, match=says):
                worker.submit_requests([Request("a", ids("ab"))])
    asyncio.run(run())


def test_what_the_engine_refuses_has_a_status():
    async def run():
        async with working(max_queued_requests=1, max_num_seqs=1, pause=0.01) as worker:
            jobs = []
            for name, stands in ("a", "running"), ("b", "waiting"):
                jobs.append(worker.submit_requests([Request(name, ids("ab"), max_tokens=200)]))
                while not worker.stats.get(stands):
                    await asyncio.sleep(0.001)
            with pytest.raises(APIError, match="wait") as refused:
                await said(worker.submit_requests([Request("c", ids("ab"))]))
            assert refused.value.status_code == 429
            with pytest.raises(APIError, match="n = 2") as refused:
                await said(worker.submit_requests([Request("d", ids("ab"), n=2)]))
            assert refused.value.status_code == 400
            assert await said(jobs[0]) == {("a", 0): "ab" * 100}
    asyncio.run(run())


def test_who_is_given_up_frees_what_it_held():
    async def run():
        async with working(pause=0.005) as worker:
            job = worker.submit_requests([Request("a", ids("ab"), max_tokens=400, n=2), Request("b",
                                                                                                ids("ab"))])
            await anext(job)
            job.close()
            job.close()
            assert not worker.streams and not worker.metrics.requests_in_flight
            async with asyncio.timeout(5):
                while worker.stats["blocks_used"]:
                    await asyncio.sleep(0.005)
            assert b'finished_reason="abort",model_name="fake"} 2.0' in worker.metrics.prometheus_text()
    asyncio.run(run())


def test_stopping_while_it_loads_leaves_nothing():
    async def run():
        worker = EngineClient(functools.partial(fake), ServerMetrics("fake"), 2)
        worker.start()
        worker.stop()
        await worker.join()
        worker.stop()
        await worker.join()
        assert worker.state == "stopped"
    before = threading.active_count()
    asyncio.run(run())
    assert threading.active_count() == before


def test_ranks_die_with_the_api_process():
    code = ("import asyncio\nfrom tests.serve.fake import meeting\n"
            "from tests.serve.test_engine_client import *\n"
            "async def run():\n"
            "    async with working(meeting, world=2) as worker:\n"
            "        await said(worker.submit_requests([Request('a', ids('ab'))]))\n"      # by all of them
            "        print(*pids(worker), flush=True)\n"
            "        await asyncio.sleep(60)\n"
            "asyncio.run(run())")
    start = [sys.executable, "-c", code]
    with subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        ranks = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(ranks) == 2 and all(map(alive, ranks))
        os.kill(ranks[1], signal.SIGSTOP)    # no hindrance
        parent.kill()
    end = time.monotonic() + 60
    while any(map(alive, ranks)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, ranks))
