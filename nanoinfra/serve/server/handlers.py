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
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.http.api_keys import salted
from nanoinfra.serve.server.http.request_ids import log_failure
from nanoinfra.serve.server.limits import most_bytes
from nanoinfra.serve.server.openai.completion_requests import Question
from nanoinfra.serve.server.openai.completion_responses import Answer
from nanoinfra.serve.server.preprocess import LARGE, Preprocessor

PIECE = 1 << 16                              # bytes of an answer sent at once
STREAM_BEGINS = 10.0                         # seconds after which a stream begins, without a word
OBJECT_BEGINS = 50.0                         # and an object: later, for errors want a status; nginx waits 60
PULSE = 15.0                                 # seconds from one sign of life to the next: event streams' own
STREAM_PULSE, OBJECT_PULSE = b": keep-alive\n\n", b" "  # a comment, and a space, which JSON may begin with
SILENCE = object()                           # in place of news


async def exchange(request: Request, kind: type[Question], form: type[Answer], prefix: str) -> Response:
    """Answer a body of `kind` in `form`; ids begin with `prefix`. Raises Refused, ClientDisconnect.

    The first word is waited for, though not for ever: until then an error can still have a status.
    """
    state, name = request.app.state, prefix + uuid.uuid4().hex
    threads, ready = state.preprocessor, at_work(state).ready
    with ExitStack() as places:
        body = await _body(request, most_bytes(ready.info["context"]),
                           lambda: places.enter_context(threads.place_for_large()))
        answer = await threads.prepare(kind, form, body, name, state.name, ready)
    job = at_work(state).submit(salted([*answer.requests.values()], request.state.salt))
    try:
        if answer.question.stream:
            first = await _unless_gone(request, anext(job), STREAM_BEGINS)
            chunks = _chunks(answer, job, first, threads, request.scope)
            return Sent(job, chunks, "text/event-stream", {"Cache-Control": "no-cache"})
        if not await _unless_gone(request, _gather(answer, job), OBJECT_BEGINS):
            return Sent(job, _late(answer, job, threads, request.scope), "application/json", {})
        whole = await threads.write(answer.places, answer.body, answer)
        return Sent(job, _pieces(whole), "application/json", {"Content-Length": str(len(whole))})
    except BaseException:
        job.close()
        raise


def at_work(state) -> Worker:
    """The app's worker. Raises Refused where it cannot be asked now."""
    if state.draining:
        raise Refused(503, "the server is about to end")
    if state.worker.state != "ready":
        raise Refused(503, state.worker.why)
    return state.worker


class Sent(StreamingResponse):
    """An answer on its way, as fast as the client reads; however it ends, the job is closed."""

    def __init__(self, job: Job, pieces: AsyncIterator[bytes], kind: str, headers: dict[str, str]):
        super().__init__(pieces, media_type=kind, headers=headers)
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        except Refused:                      # _late has logged it; returning here, uvicorn breaks what is
            pass                             #   not complete, which is how the client learns of it
        finally:
            self.job.close()


async def _body(request, most: int, grows: Callable[[], None]):
    """The request's body; `grows` is called once it is LARGE. Raises Refused where it is too large.

    What is refused is read to its end, or 16 times what may be: few clients listen before.
    """
    body, size, refused = bytearray(), 0, None
    async for piece in request.stream():
        was, size = size, size + len(piece)
        refused = refused or _refusal(was, size, most, grows)
        if size > 16 * most:
            break
        body += b"" if refused else piece
    if refused:
        raise refused
    return bytes(body)


def _refusal(was, size, most, grows):
    if size > most:
        return Refused(413, f"the body is larger than {most} bytes; send less at once")
    try:
        if was <= LARGE < size:
            grows()
    except Refused as why:
        return why
    return None


async def _unless_gone(request, work, seconds):
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


async def _gather(answer: Answer, job: Job):
    """Add all that comes; True. What has been added stays so where this is cancelled."""
    async for event in job:
        answer.add(event)
    return True


async def _chunks(answer: Answer, job: Job, first: Event | None, threads: Preprocessor, scope):
    try:
        event = first or SILENCE
        while event:
            if event is SILENCE:
                yield STREAM_PULSE
            else:
                yield await threads.write(len(event.prompt), functools.partial(answer.chunk, event), answer)
                await asyncio.sleep(0)       # however much has come: others have their turn
            event = await _soon(anext(job, None))
        yield await threads.write(answer.places_at_end, answer.last, answer)
    except Refused as why:                   # too late for a status
        log_failure(scope, why)
        yield answer.failed(why)


async def _late(answer: Answer, job: Job, threads: Preprocessor, scope):
    """The object, and before it spaces for as long as it takes."""
    try:
        yield OBJECT_PULSE
        while await _soon(_gather(answer, job)) is SILENCE:
            yield OBJECT_PULSE
        whole = await threads.write(answer.places, answer.body, answer)
    except Refused as why:                   # the connection breaks, for an object that is none would be read
        log_failure(scope, why)
        raise
    async for piece in _pieces(whole):
        yield piece


async def _soon(work):
    """What `work` comes to, or SILENCE after PULSE seconds."""
    try:
        async with asyncio.timeout(PULSE):
            return await work
    except TimeoutError:
        return SILENCE


async def _pieces(whole: bytes):
    for at in range(0, len(whole), PIECE):
        yield whole[at:at + PIECE]
