"""An answer that is long in coming begins in time, and says that it is on its way."""
import asyncio
import json

import pytest
from openai._streaming import SSEDecoder

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import RequestOutput
from nanoinfra.serve.processes.response_stream import ResponseStream
from nanoinfra.serve.server import generation_handlers
from nanoinfra.serve.server.fastapi_app import build_app
from tests.serve.fake import Idle

BODY = {"prompt": "a", "max_tokens": 2}


class Held(Idle):
    """Says nothing until it is told to."""

    def __init__(self):
        self.streams = {}

    def submit_requests(self, requests):
        self.job = ResponseStream(self, requests)
        self.streams = dict.fromkeys(self.job.unfinished, self.job)
        return self.job

    def abort_request(self, request):
        pass

    def speak(self):
        name, = self.job.unfinished
        for text, finish in (("x", None), ("y", "length")):
            self.job.put_output(RequestOutput(name, 0, text, [120], finish_reason=finish))

    def fail(self):
        name, = self.job.unfinished
        self.job.fail_request(name, APIError(503, "the engine died"))


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Nobody waits: an answer begins at once, and whoever has nothing to say says so."""
    for name in ("_STREAM_START_TIMEOUT_SECONDS", "_JSON_START_TIMEOUT_SECONDS",
                 "_KEEP_ALIVE_INTERVAL_SECONDS"):
        monkeypatch.setattr(generation_handlers, name, 0.001)


def answered(then, pulses=2, **more):
    """(status, headers, body, is it complete) where `then(worker)` comes after so many pulses."""
    worker = Held()
    app, sent = build_app(worker, "fake"), []
    body = json.dumps(BODY | more).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
             "scheme": "http", "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
             "asgi": {"spec_version": "2.3"}}

    async def call():
        bodies, gone = iter([body]), asyncio.Event()

        async def receive():
            for piece in bodies:
                return {"type": "http.request", "body": piece, "more_body": False}
            await gone.wait()

        async def send(message):
            sent.append(message)
            if len(sent) == 1 + pulses:
                then(worker)
        await app(scope, receive, send)
    try:
        asyncio.run(call())
    finally:
        app.state.preprocessor.close()
    start, *rest = sent
    whole = b"".join(each["body"] for each in rest)
    return start["status"], dict(start["headers"]), whole, not rest[-1]["more_body"]


def test_a_stream_begins_with_comments_which_clients_skip():
    status, headers, body, complete = answered(Held.speak, stream=True)
    assert (status, headers[b"content-type"], complete) == (200, b"text/event-stream; charset=utf-8", True)
    assert body.startswith(b": keep-alive\n\n: keep-alive\n\ndata: {")
    *events, done = [event.data for event in SSEDecoder().iter_bytes(iter([body])) if event.data]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "xy" and done == "[DONE]"


def test_an_object_begins_with_spaces_which_json_may():
    status, headers, body, complete = answered(Held.speak)
    assert (status, complete) == (200, True) and b"content-length" not in headers
    assert body.startswith(b"  {") and json.loads(body)["choices"][0]["text"] == "xy"


def test_what_fails_after_it_has_begun_is_no_answer_and_is_in_the_log(caplog):
    """A stream says why; an object that is none would be taken for one, so the connection breaks."""
    _, _, body, complete = answered(Held.fail, stream=True)
    error = json.loads(body.split(b"data: ")[1])["error"]
    assert error["message"] == "the engine died" and error["code"] is None and complete
    _, _, body, complete = answered(Held.fail)
    assert not body.strip() and not complete
    assert caplog.text.count("503, the engine died (x-request-id ") == 2

