"""Ten thousand hostile requests beside ordinary clients, who notice nothing; and nothing is kept of them."""
import asyncio
import json
import os
import subprocess
import sys

import pytest

from tests.processes import children
from tests.serve import fuzz
from tests.serve.host import ROOT
from tests.serve.test_load import alone, health, is_empty, memory, real, stream

CLIENTS, LENGTHS, VOCAB = 20, (1, 24, 60), 262       # conftest.py's model


async def ordinary(client, want, report):
    """20 clients that ask one after the other until the fuzzer has ended; how often they were answered."""
    asked = served = 0

    async def ask():
        nonlocal asked, served
        while not report.done():
            i, tokens, asked = asked % 16, LENGTHS[asked % len(LENGTHS)], asked + 1
            text = await stream(client, i, tokens)
            assert text in (None, want[i, tokens])           # None: 429, come back later
            served += text is not None
            await asyncio.sleep(0.1)
    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return served


async def beside(client, want, n, seed):
    """(the fuzzer's report, how many requests of ordinary clients were answered meanwhile)."""
    url, context = client.base_url, client.get("/v1/models").json()["data"][0]["max_model_len"]
    command = [sys.executable, "-m", "tests.serve.fuzz", f"{url.host}:{url.port}", context, VOCAB, n, seed]
    process = await asyncio.create_subprocess_exec(*map(str, command), cwd=ROOT, stdout=subprocess.PIPE)
    try:
        report = asyncio.ensure_future(process.communicate())
        served = await ordinary(client, want, report)
        return json.loads((await report)[0]), served
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


LONG = pytest.mark.prove, pytest.mark.timeout(3600)


@pytest.mark.parametrize("n", [160, pytest.param(10_000, marks=LONG)])
def test_whatever_strangers_send_ordinary_clients_are_served(model, n):
    with real(model, "float32", "--kv-memory", "1MiB") as (process, client):
        engine, want = children(process.pid), alone(client, LENGTHS)
        if n == 10_000:                      # 48 ordinary requests till here, 240 in all
            assert all(alone(client, LENGTHS) == want for _ in range(4))
        before = memory(process.pid)
        with health(client) as times:
            report, served = asyncio.run(beside(client, want, n, os.environ.get("FUZZ_SEED", "0")))
        grown, times = memory(process.pid) - before, sorted(times)
        p99, worst = times[int(0.99 * len(times))], times[-1]
        print(json.dumps(report["statuses"]))
        print(f"/health: p99 {p99:.3f}, worst {worst:.3f} s of {len(times)}; {served} ordinary answers; "
              f"the API grew by {grown / 2 ** 20:.1f} MB")
        counts = [sum(each.values()) for each in report["statuses"].values()]
        assert report["bad"] == [] and sum(counts) == n and len(counts) == len(fuzz.KINDS)
        assert min(counts) >= min(fuzz.LEAST, n // len(fuzz.KINDS)) and served >= CLIENTS
        assert engine[0] in children(process.pid)
        is_empty(client)
        if n == 10_000:                      # of fewer the percentile says little
            assert p99 <= 0.2 and worst <= 1.0 and grown < 64 << 20
