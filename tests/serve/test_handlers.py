"""One client's exchange is nobody else's affair: who sends much, late or nothing, or reads nothing."""
import asyncio
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server import generation_handlers, preprocess_requests
from nanoinfra.serve.server.preprocess_requests import (
    _MAX_LARGE_BODIES,
    LARGE_BODY_BYTES,
    RequestPreprocessor,
)
from nanoinfra.serve.server.request_limits import MAX_BODY_BYTES
from tests.serve import hostile
from tests.serve.beating import beating, looping
from tests.serve.host import serving, until

CONTEXT, VOCAB = 8192, 257
KINDS = list(hostile.KINDS)
HELLO = {"prompt": "hello", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
ANSWERED = hostile.allowed(CONTEXT, VOCAB)
CASES = hostile.cases(CONTEXT, VOCAB) | {name: (*case, 200) for name, case in ANSWERED.items()}


@pytest.fixture(scope="module")
def beats():
    with beating(context=CONTEXT, blocks=4096, size=16) as (process, client):
        client.post(hostile.CHATS, json=CHAT)
        yield process, client


@pytest.fixture(scope="module")
def served():
    with serving(factory=looping, context=512) as (client, server):
        yield client, server
        server.app_state.preprocessor.close()


@pytest.mark.parametrize("path, body, status", CASES.values(), ids=CASES.keys())
def test_what_is_hostile_has_its_status(beats, path, body, status):
    got = beats[1].post(path, content=body, headers=hostile.JSON)
    assert got.status_code == status, got.text[:500]
    assert status == 200 or len(got.json()["error"]["message"]) < 1100


@pytest.mark.timed
@pytest.mark.parametrize("path, body, status", CASES.values(), ids=CASES.keys())
def test_the_event_loop_waits_less_than_50_ms(beats, path, body, status):
    """The best of five: what holds the loop does so each time, what the machine does beside does not."""
    lags = []
    while len(lags) < 5 and min(lags, default=1.0) >= 0.05:
        beats[1].get("/lag")
        assert beats[1].post(path, content=body, headers=hostile.JSON).status_code == status
        lags.append(min(beats[1].get("/lag").json().values()))
    assert min(lags) < 0.05, lags


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_hostile_requests_are_answered_or_refused(beats, kind):
    draws = hostile.Random(kind)
    for _ in range(6):
        path, headers, body = hostile.draw(kind, draws, CONTEXT, VOCAB)
        got = beats[1].post(path, content=body, headers=headers)
        assert got.status_code in {200, *hostile.REFUSALS}, (body[:500], got.text[:500])


def test_a_chat_that_goes_on_and_on_keeps_nobody_waiting(served):
    client, _ = served
    loop, said, beside = {**CHAT, "messages": [{"role": "loop", "content": ""}]}, [], []
    thread = threading.Thread(target=lambda: said.append(client.post(hostile.CHATS, json=loop)))
    thread.start()
    try:
        until(lambda: served[1].app_state.preprocessor.num_waiting["chats"])
        while not said:
            beside += [client.post(path, json=body) for path, body in ((hostile.COMPLETIONS, HELLO),
                                                                       (hostile.CHATS, CHAT))]
    finally:
        thread.join()
    assert len(beside) > 2                   # answered before it was given up
    assert {each.status_code for each in beside} == {200}
    assert said[0].status_code == 400 and "more than 2 s" in said[0].json()["error"]["message"]


@contextmanager
def sending(client, size, first):
    """A socket that has sent the head of a body of `size` bytes and its first ones."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as stranger:
        stranger.settimeout(30)
        stranger.sendall(f"POST {hostile.COMPLETIONS} HTTP/1.1\r\nHost: {client.base_url.host}\r\n"
                         f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode() + first)
        yield stranger


def test_few_large_bodies_are_read_at_once_and_small_ones_always(served):
    client, server = served
    large = json.dumps(HELLO).encode().ljust(2 * LARGE_BODY_BYTES)
    with ExitStack() as strangers:
        for _ in range(_MAX_LARGE_BODIES):
            strangers.enter_context(sending(client, 2 * LARGE_BODY_BYTES, large[:-9]))
        until(lambda: server.app_state.preprocessor.num_large_bodies == _MAX_LARGE_BODIES)
        got = client.post(hostile.COMPLETIONS, content=large, headers=hostile.JSON)
        assert got.status_code == 429 and got.headers["retry-after"]
        assert client.post(hostile.COMPLETIONS, json=HELLO).status_code == 200
    until(lambda: server.app_state.preprocessor.num_large_bodies == 0)
    assert client.post(hostile.COMPLETIONS, content=large, headers=hostile.JSON).status_code == 200


def test_a_body_is_not_kept_once_it_is_too_large():
    class Endless:
        sent = 0

        async def stream(self):
            while True:
                self.sent += MAX_BODY_BYTES
                yield b" " * MAX_BODY_BYTES
    endless = Endless()
    with pytest.raises(APIError) as refused:
        asyncio.run(generation_handlers._read_body(endless, MAX_BODY_BYTES, lambda: None))
    assert refused.value.status_code == 413 and endless.sent == 17 * MAX_BODY_BYTES


def test_too_many_that_wait_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr(preprocess_requests, "_MAX_WAITING_PER_POOL", 3)
    threads, go = RequestPreprocessor(), threading.Event()

    async def crowd():
        waiting = [asyncio.ensure_future(threads.run_in_pool("chats", go.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(APIError) as refused:
            await threads.run_in_pool("chats", go.wait)
        assert await threads.run_in_pool("texts", str) == ""             # others are read meanwhile
        go.set()
        await asyncio.gather(*waiting)
        assert await threads.run_in_pool("chats", str) == ""
        return refused.value.status_code
    try:
        assert asyncio.run(crowd()) == 429
    finally:
        go.set()
        threads.close()


def test_large_answers_are_written_in_a_thread():
    class Answer:
        def is_slow_to_encode(self, num_tokens):
            return num_tokens > 9
    threads = RequestPreprocessor()

    async def who(places):
        return await threads.encode_response(places, lambda: threading.current_thread().name, Answer())
    try:
        assert "answers" in asyncio.run(who(10)) and "answers" not in asyncio.run(who(9))
    finally:
        threads.close()


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_hostile_requests_leave_the_api_process_as_large_as_it_was():
    """At most 64 MB more than after 200 ordinary requests, with eight strangers at once."""
    with (beating(context=CONTEXT, blocks=4096, size=16, model="smollm2-135m") as (process, client),
          ThreadPoolExecutor(8) as crowd):
        for i in range(100):
            client.post(hostile.COMPLETIONS, json={"prompt": f"hello {i}", "max_tokens": 16})
            client.post(hostile.CHATS, json=CHAT)

        def stranger(seed):
            path, headers, body = hostile.draw(KINDS[seed % len(KINDS)], hostile.Random(seed), CONTEXT, VOCAB)
            got = client.post(path, content=body, headers=headers)
            return resident(process.pid), got.status_code, body[:500]
        begin, said = resident(process.pid), list(crowd.map(stranger, range(2000)))
        assert [body for _, status, body in said if status not in {200, *hostile.REFUSALS}] == []
        worst = max(size for size, _, _ in said)
        assert worst - begin < 64 << 20, f"{begin >> 20} MB before, {worst >> 20} at worst"


def resident(pid):
    """Bytes of memory that a process has."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
