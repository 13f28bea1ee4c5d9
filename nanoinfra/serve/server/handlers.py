"""One exchange with a client: read what it asks, let the engine answer, say it at once or as it comes.

A client that goes away frees what it held, whether it waits for a first word or for the last; one that sends
or reads nothing for too long is made to (connections.py). Clients, and proxies on the way, give up where
nothing comes for long: an answer begins in time, with a status that says nothing yet, and says now and then
that it is still on its way.
"""
import asyncio
import functools
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from nanoinfra.serve.engine.requests import Event
from nanoinfra.serve.processes.engine_client import Job, Worker
from nanoinfra.serve.server.errors import APIError
from nanoinfra.serve.server.http.api_keys import prepend_cache_salt
from nanoinfra.serve.server.http.request_ids import log_server_error
from nanoinfra.serve.server.openai.completion_requests import BaseCompletionRequest
from nanoinfra.serve.server.openai.completion_responses import BaseCompletionResponse
from nanoinfra.serve.server.preprocess import LARGE_BODY_BYTES, RequestPreprocessor
from nanoinfra.serve.server.request_limits import max_body_bytes

_BODY_CHUNK_BYTES = 1 << 16                              # bytes of an answer sent at once
_STREAM_START_TIMEOUT_SECONDS = 10.0         # seconds after which a stream begins, without a word
_JSON_START_TIMEOUT_SECONDS = 50.0           # and an object: later, for errors want a status; nginx waits 60
_KEEP_ALIVE_INTERVAL_SECONDS = 15.0          # seconds from one sign of life to the next: event streams' own
_STREAM_KEEP_ALIVE, _JSON_KEEP_ALIVE = b": keep-alive\n\n", b" "  # a comment, and a space, which JSON may begin with
_NO_OUTPUT_YET = object()                           # in place of news


async def handle_generation_request(request: Request, kind: type[BaseCompletionRequest],
                                    form: type[BaseCompletionResponse], prefix: str) -> Response:
    """Answer a body of `kind` in `form`; ids begin with `prefix`. Raises Refused, ClientDisconnect.

    The first word is waited for, though not for ever: until then an error can still have a status.
    """
    state, name = request.app.state, prefix + uuid.uuid4().hex
    threads, ready = state.preprocessor, require_ready_engine(state).ready
    with ExitStack() as places:
        body = await _read_body(request, max_body_bytes(ready.info["context"]),
                           lambda: places.enter_context(threads.place_for_large()))
        answer = await threads.prepare(kind, form, body, name, state.name, ready)
    job = require_ready_engine(state).submit(prepend_cache_salt([*answer.requests.values()],
                                                                request.state.salt))
    try:
        if answer.question.stream:
            first = await _unless_disconnected(request, anext(job), _STREAM_START_TIMEOUT_SECONDS)
            chunks = _stream_chunks(answer, job, first, threads, request.scope)
            return _StreamClosingResponse(job, chunks, "text/event-stream", {"Cache-Control": "no-cache"})
        if not await _unless_disconnected(request, _collect_outputs(answer, job),
                                          _JSON_START_TIMEOUT_SECONDS):
            return _StreamClosingResponse(job, _late_json(answer, job, threads, request.scope),
                                          "application/json", {})
        whole = await threads.write(answer.places, answer.body, answer)
        return _StreamClosingResponse(job, _split_body(whole), "application/json",
                                      {"Content-Length": str(len(whole))})
    except BaseException:
        job.close()
        raise


def require_ready_engine(state) -> Worker:
    """The app's worker. Raises Refused where it cannot be asked now."""
    if state.draining:
        raise APIError(503, "the server is about to end")
    if state.worker.state != "ready":
        raise APIError(503, state.worker.why)
    return state.worker


class _StreamClosingResponse(StreamingResponse):
    """An answer on its way, as fast as the client reads; however it ends, the job is closed."""

    def __init__(self, job: Job, pieces: AsyncIterator[bytes], kind: str, headers: dict[str, str]):
        super().__init__(pieces, media_type=kind, headers=headers)
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        except APIError:                      # _late has logged it; returning here, uvicorn breaks what is
            pass                             #   not complete, which is how the client learns of it
        finally:
            self.job.close()


async def _read_body(request, most: int, grows: Callable[[], None]):
    """The request's body; `grows` is called once it is LARGE. Raises Refused where it is too large.

    What is refused is read to its end, or 16 times what may be: few clients listen before.
    """
    body, size, refused = bytearray(), 0, None
    async for piece in request.stream():
        was, size = size, size + len(piece)
        refused = refused or _body_error(was, size, most, grows)
        if size > 16 * most:
            break
        body += b"" if refused else piece
    if refused:
        raise refused
    return bytes(body)


def _body_error(was, size, most, grows):
    if size > most:
        return APIError(413, f"the body is larger than {most} bytes; send less at once")
    try:
        if was <= LARGE_BODY_BYTES < size:
            grows()
    except APIError as why:
        return why
    return None


async def _unless_disconnected(request, work, seconds):
    """What `work` comes to; None where it takes longer. Raises ClientDisconnect if the client goes away."""
    leaves = request.receive()               # after the body comes nothing but this
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leaves)]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        if tasks[1].done():
            raise ClientDisconnect
        return None                          # what it waits for stays in the job's queue
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _collect_outputs(answer: BaseCompletionResponse, job: Job):
    """Add all that comes; True. What has been added stays so where this is cancelled."""
    async for event in job:
        answer.add(event)
    return True


async def _stream_chunks(answer: BaseCompletionResponse, job: Job, first: Event | None,
                         threads: RequestPreprocessor, scope):
    try:
        event = first or _NO_OUTPUT_YET
        while event:
            if event is _NO_OUTPUT_YET:
                yield _STREAM_KEEP_ALIVE
            else:
                yield await threads.write(len(event.prompt), functools.partial(answer.chunk, event), answer)
                await asyncio.sleep(0)       # however much has come: others have their turn
            event = await _or_no_output_yet(anext(job, None))
        yield await threads.write(answer.places_at_end, answer.last, answer)
    except APIError as why:                   # too late for a status
        log_server_error(scope, why)
        yield answer.failed(why)


async def _late_json(answer: BaseCompletionResponse, job: Job, threads: RequestPreprocessor, scope):
    """The object, and before it spaces for as long as it takes."""
    try:
        yield _JSON_KEEP_ALIVE
        while await _or_no_output_yet(_collect_outputs(answer, job)) is _NO_OUTPUT_YET:
            yield _JSON_KEEP_ALIVE
        whole = await threads.write(answer.places, answer.body, answer)
    except APIError as why:                  # the connection breaks, for an object that is none would be read
        log_server_error(scope, why)
        raise
    async for piece in _split_body(whole):
        yield piece


async def _or_no_output_yet(work):
    """What `work` comes to, or SILENCE after PULSE seconds."""
    try:
        async with asyncio.timeout(_KEEP_ALIVE_INTERVAL_SECONDS):
            return await work
    except TimeoutError:
        return _NO_OUTPUT_YET


async def _split_body(whole: bytes):
    for at in range(0, len(whole), _BODY_CHUNK_BYTES):
        yield whole[at:at + _BODY_CHUNK_BYTES]
