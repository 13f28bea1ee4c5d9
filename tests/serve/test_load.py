"""Many clients at once, clients that go away, more than there is room for: nothing is lost or hangs."""
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from tests.processes import children
from tests.serve.host import SERVE, metric, running, serving, started, until


@asynccontextmanager
async def asked(client, path, body=None):
    """A reader of the answer, head and all; in the end the connection is closed, whatever has come."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    data = json.dumps(body).encode() if body else b""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n" if body else ""
    writer.write(f"{head}{kind}\r\n".encode() + data)
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


def body(i, tokens, **more):
    return {"prompt": f"the prompt of {i} ", "max_tokens": tokens, "stream": True, "temperature": 0, **more}


def expected(i, tokens):
    prompt = f"the prompt of {i} "
    return (prompt * (tokens // len(prompt) + 1))[:tokens]


async def stream(client, i, tokens, leave=None):
    """The text of a stream, which the client leaves after `leave` chunks; None where it shall come back."""
    text, chunks, done = "", 0, False
    async with asked(client, "/v1/completions", body(i, tokens)) as reader:
        status = int((await reader.readline()).split()[1])
        if status == 429:
            return None
        assert status == 200
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                chunks += 1
            if leave is not None and chunks >= leave:
                return text
            done |= line.startswith(b"data: [DONE]")
    assert done
    return text


POLL = """
import http.client, json, sys, threading, time
times = []
def ask():
    while True:
        begin, connection = time.monotonic(), http.client.HTTPConnection(sys.argv[1], timeout=300)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        times.append(time.monotonic() - begin)
        time.sleep(0.02)
threading.Thread(target=ask, daemon=True).start()
sys.stdin.read()
print(json.dumps(times))
"""


@contextmanager
def health(client):
    """Asked every 20 ms by another process, whose own clients keep it from nothing; the times, in the end."""
    times, host = [], f"{client.base_url.host}:{client.base_url.port}"
    command = [sys.executable, "-c", POLL, host]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as asks:
        yield times
        times += json.loads(asks.communicate()[0])


def is_empty(client):
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    until(lambda: not any(metric(client, name) for name in names))


def test_two_hundred_streams_at_once():
    """More than there are seats, in a pool too small for them: some wait, some are preempted."""
    async def work():
        return await asyncio.gather(*(stream(client, i, 24) for i in range(200)))
    with serving(blocks=60, max_num_seqs=32, max_num_batched_tokens=64) as (client, server):
        assert asyncio.run(work()) == [expected(i, 24) for i in range(200)]
        assert metric(client, "num_preemptions_total") > 0
        is_empty(client)
        assert not server.engine_client.streams and not server.engine_client.metrics.requests_in_flight


def real(model, dtype, *more):
    """`nanoinfra serve` of a model; its name is what `metric` asks for."""
    return started([*SERVE, str(model), "--served-model-name", "fake", "--dtype", dtype, *more])


def alone(client, lengths):
    """{(i, tokens): text} of 16 prompts, one request at a time."""
    return {(i, tokens): asyncio.run(stream(client, i, tokens)) for i in range(16) for tokens in lengths}


@pytest.mark.prove
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_hundred_streams_of_a_real_model_say_what_each_says_alone(model, dtype):
    async def work():
        return await asyncio.gather(*(stream(client, i % 16, 24) for i in range(200)))
    with real(model, dtype, "--kv-memory", "128KiB", "--max-num-seqs", "32", "--max-num-batched-tokens",
              "64") as (_, client):
        want = alone(client, [24])
        assert asyncio.run(work()) == [want[i % 16, 24] for i in range(200)] and len(set(want.values())) == 16
        assert metric(client, "num_preemptions_total") > 0
        is_empty(client)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_what_it_held(streams):
    async def ask(i):
        async with asked(client, "/v1/completions", body(i, 480, stream=streams)) as reader:
            await reader.read()

    async def work():
        asking = [asyncio.create_task(ask(i)) for i in range(3)]         # one runs, two wait
        while len(server.engine_client.streams) < 3 or not server.engine_client.stats.get("blocks_used"):
            await asyncio.sleep(0.01)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    with serving(pause=0.005, max_num_seqs=1) as (client, server):
        asyncio.run(work())
        until(lambda: not server.engine_client.streams)
        is_empty(client)


def test_too_much_is_a_429_and_the_rest_goes_on():
    async def work():
        return await asyncio.gather(*(stream(client, i, 20) for i in range(40)))
    with serving(pause=0.002, max_num_seqs=2, max_queued_requests=4) as (client, _):
        got = asyncio.run(work())
        assert None in got and len(set(got)) > 3
        assert all(text in (None, expected(i, 20)) for i, text in enumerate(got))
        is_empty(client)


def test_a_batch_of_which_one_is_refused_leaves_nothing():
    with serving(max_queued_requests=4, max_num_seqs=1, pause=0.005) as (client, server):
        got = client.post("/v1/completions", json={"prompt": ["ab"] * 9, "max_tokens": 50})
        assert got.status_code == 429 and got.headers["Retry-After"] == "1"
        assert got.json()["error"]["type"] == "rate_limit_error" and not server.engine_client.streams
        is_empty(client)


def test_the_death_of_a_rank_is_an_error_and_the_server_goes_on():
    with serving(tp=2, pause=0.01) as (client, server):
        with client.stream("POST", "/v1/completions", json=body(1, 400)) as response:
            begun = response.iter_lines()
            next(begun)
            os.kill(server.engine_client.processes.processes[1].pid, signal.SIGKILL)
            lines = [line for line in begun if line]
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error" and error["code"] is None
        assert "SIGKILL" in error["message"] and lines[-1] == "data: [DONE]"
        until(lambda: client.get("/health").status_code == 200)
        again = client.post("/v1/completions", json=body(1, 3, stream=False)).json()
        assert again["choices"][0]["text"] == "the"


def test_while_it_loads_it_says_503():
    with serving(factory=slow, wait=False) as (client, _):
        until(lambda: client.get("/health").status_code == 503)
        for got in (client.get("/v1/models"), client.post("/v1/completions", json=body(1, 3))):
            assert got.status_code == 503 and got.headers["Retry-After"] and "being loaded" in got.text
        assert client.get("/metrics").status_code == client.get("/").status_code == 200


def slow(team):
    time.sleep(60)


def memory(pid):
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


SERVERS = {"stand-in": lambda model: running(pause=0.01, blocks=200, max_num_seqs=64,
                                             max_num_batched_tokens=256, max_queued_requests=4096),
           "float32": lambda model: real(model, "float32", "--kv-memory", "1MiB", "--max-queued-requests",
                                         "4096"),
           "float64": lambda model: real(model, "float64", "--kv-memory", "2MiB", "--max-queued-requests",
                                         "4096")}


@pytest.mark.prove
@pytest.mark.parametrize("server", SERVERS)
def test_two_thousand_requests_with_random_aborts(model, server):
    draws, lengths = random.Random(0), (1, 24, 60)

    async def one(i, gate):
        async with gate:
            tokens, leave = draws.choice(lengths), draws.choice([None, None, draws.randint(0, 20)])
            text, whole = await stream(client, i % 16, tokens, leave), want[i % 16, tokens]
            assert text == whole if leave is None else whole.startswith(text)

    async def work(n):
        gate = asyncio.Semaphore(200)
        await asyncio.gather(*(one(i, gate) for i in range(n)))

    with SERVERS[server](model) as (process, client):
        pids, want = [process.pid, *children(process.pid)], alone(client, lengths)
        if server == "stand-in":
            assert want == {(i, tokens): expected(i, tokens) for i, tokens in want}
        asyncio.run(work(500))
        before = [memory(pid) for pid in pids]
        with health(client) as times:
            asyncio.run(work(2000))
        grown = [memory(pid) - had for pid, had in zip(pids, before)]
        p99 = sorted(times)[int(0.99 * len(times))]
        print(f"/health: p99 {p99 * 1e3:.1f} ms of {len(times)}; API and engine grew by {grown} bytes")
        is_empty(client)
        assert p99 < 0.2 and max(grown) < 8 << 20
        assert all(metric(client, f"request_{kind}_sum") > 0 for kind in ("queue_time_seconds", "params_n"))
