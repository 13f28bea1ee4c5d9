"""The HTTP server: OpenAI's API over a Worker, metrics, and a page to chat and to watch the scheduler.

Whatever a client sends is answered: 400 with the reason, 401, 404, 413; 429 where too much waits; 503 while
the engine loads, starts again or the server ends. No key is needed for health, metrics and the page.
"""
import asyncio
import hmac
import time
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from nanoinfra.serve.answers import ChatAnswer, CompletionAnswer, sent
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.exchange import at_work, exchange
from nanoinfra.serve.protocol import Chat, Completion
from nanoinfra.serve.worker import Worker

PULSE = 0.2                                  # seconds from one look at the scheduler to the next
PAGE = Path(__file__).with_name("page.html")
OFFLINE = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:"}


def build(worker: Worker, name: str, api_key: str | None = None) -> FastAPI:
    """The app, which starts and stops `worker`; clients call the model `name`.

    Set `app.state.draining`, and what is new is refused.
    """
    @asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield
        worker.stop()
        await worker.join()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker, app.state.name, app.state.key = worker, name, api_key
    app.state.draining, app.state.since = False, int(time.time())
    for path, answer in {"/health": _health, "/metrics": _metrics, "/stats": _stats, "/": _page}.items():
        app.add_api_route(path, answer)
    known = [Depends(_known)]
    app.add_api_route("/v1/models", _models, dependencies=known)
    for path, answer in {"/v1/completions": _completions, "/v1/chat/completions": _chat,
                         "/reset_prefix_cache": _reset}.items():
        app.add_api_route(path, answer, methods=["POST"], dependencies=known)
    for error, answer in {Refused: _refused, HTTPException: _http, ClientDisconnect: _gone,
                          Exception: _bug}.items():
        app.add_exception_handler(error, answer)
    return app


async def _completions(request: Request):
    return await exchange(request, Completion, CompletionAnswer, "cmpl-")


async def _chat(request: Request):
    return await exchange(request, Chat, ChatAnswer, "chatcmpl-")


async def _models(request: Request):
    state = request.app.state
    context = at_work(state).ready.info["context"]
    return JSONResponse({"object": "list", "data": [{
        "id": state.name, "object": "model", "created": state.since, "owned_by": "nanoinfra",
        "root": state.name, "parent": None, "max_model_len": context}]})


async def _reset(request: Request):
    at_work(request.app.state).reset()
    return Response()


async def _health(request: Request):
    at_work(request.app.state)
    return Response()


async def _metrics(request: Request):
    return Response(request.app.state.worker.watch.text(), media_type="text/plain; version=0.0.4")


async def _stats(request: Request):
    """The scheduler, live: for the page."""
    async def looks(state):
        while not state.draining and (worker := state.worker).state != "stopped":
            chat = worker.ready is None or worker.ready.template is not None
            yield sent({"model": state.name, "state": worker.state, "chat": chat, **worker.stats})
            await asyncio.sleep(PULSE)
    return StreamingResponse(looks(request.app.state), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache"})


async def _page(request: Request):
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=OFFLINE)


async def _known(request: Request):
    """Does the client have the key?"""
    key, given = request.app.state.key, request.headers.get("authorization", "")
    if key and not hmac.compare_digest(f"Bearer {key}".encode(), given.encode("latin-1")):
        raise Refused(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                      code="invalid_api_key")


async def _refused(request, why: Refused):
    return JSONResponse(why.body(), why.status, why.headers())


async def _http(request, error: HTTPException):
    why = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(why.body(), why.status, error.headers)


async def _gone(request, error):
    return Response(status_code=499)         # to nobody: the client has closed the connection


async def _bug(request, error):
    """Our mistake; uvicorn writes down where."""
    return JSONResponse(Refused(500, "the server made a mistake; its log says more").body(), 500)
