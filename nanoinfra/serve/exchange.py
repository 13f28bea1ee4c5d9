"""One exchange with a client: read what it asks, let the engine answer, say it at once or as it comes.

A client that goes away frees what it held, whether it waits for a first word or for the last.
"""
import asyncio
import uuid

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from nanoinfra.serve.answers import Answer, failed
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.keys import salted
from nanoinfra.serve.protocol import Question, read, requests_of
from nanoinfra.serve.worker import Job, Worker

MOST_BYTES = 8 << 20                         # of a request's body


async def exchange(request: Request, kind: type[Question], form: type[Answer], prefix: str) -> Response:
    """Answer a body of `kind` in `form`; ids begin with `prefix`. Raises Refused, ClientDisconnect.

    The first word is waited for: until then an error can still have a status.
    """
    state, name = request.app.state, prefix + uuid.uuid4().hex
    at_work(state)
    body = await _body(request)
    question, asked = await asyncio.to_thread(_asked, kind, body, name, state)
    asked = salted(asked, request.state.salt)
    answer = form(question, name, state.name, asked, state.worker.ready.text)
    job = at_work(state).submit(asked)
    try:
        first = await _unless_gone(request, _collect(job, 1 if question.stream else None))
        if not question.stream:
            return JSONResponse(answer.object(first))
    except BaseException:
        job.close()
        raise
    return Stream(job, _chunks(answer, job, first))


def at_work(state) -> Worker:
    """The app's worker. Raises Refused where it cannot be asked now."""
    if state.draining:
        raise Refused(503, "the server is about to end")
    if state.worker.state != "ready":
        raise Refused(503, state.worker.why)
    return state.worker


class Stream(StreamingResponse):
    """Server-sent events; however it ends, the job is closed."""

    def __init__(self, job, chunks):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


def _asked(kind, body, name, state):
    """In a thread: parsing and tokenizing a long prompt take their time."""
    question = read(kind, body)
    if question.model not in (None, state.name):
        raise Refused(404, f"there is no model {question.model!r} here; there is {state.name!r}", "model",
                      "model_not_found")
    return question, requests_of(question, name, state.worker.ready)


async def _body(request):
    """The request's body. Raises Refused for one that is too large; no more than that is kept of it."""
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BYTES:
            body += piece
        elif size > 16 * MOST_BYTES:         # up to there it is read to its end: few clients listen before
            break
    if size > MOST_BYTES:
        raise Refused(413, f"the body is larger than {MOST_BYTES} bytes; send less at once")
    return bytes(body)


async def _unless_gone(request, work):
    """What `work` comes to. Raises ClientDisconnect if the client goes away before."""
    leaves = request.receive()               # after the body comes nothing but this
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(leaves)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _collect(job: Job, most: int | None):
    """The next `most` events; all there are, if None."""
    events = []
    while most is None or len(events) < most:
        try:
            events.append(await anext(job))
        except StopAsyncIteration:
            break
    return events


async def _chunks(answer: Answer, job: Job, first):
    try:
        for event in first:
            yield answer.chunk(event)
        async for event in job:
            yield answer.chunk(event)
            await asyncio.sleep(0)           # however much has come: others have their turn
        yield answer.last()
    except Refused as why:                   # too late for a status
        yield failed(why)
