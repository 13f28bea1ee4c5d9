"""The HTTP server: OpenAI's API over a Worker, metrics, and a page to chat and to watch the scheduler.

Whatever a client sends is answered: 400 with the reason, 401, 404, 413; 403 and 415 by access.py; 429 where
too much waits; 503 while the engine loads, starts again or the server ends. No key is needed for health,
metrics and the page. Every answer has an x-request-id (request_ids.py).
"""
import asyncio
import time
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from nanoinfra.serve.processes.engine_client import Worker
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.handlers import at_work, exchange
from nanoinfra.serve.server.http.access_control import Access, AccessMiddleware
from nanoinfra.serve.server.http.api_keys import key_of, salt_of
from nanoinfra.serve.server.http.request_ids import HEADER, RequestIdMiddleware, log_failure
from nanoinfra.serve.server.http.unserved_routes import where_else
from nanoinfra.serve.server.openai.completion_requests import Chat, Completion
from nanoinfra.serve.server.openai.completion_responses import ChatAnswer, CompletionAnswer, sent
from nanoinfra.serve.server.openai.responses_output import ResponsesAnswer
from nanoinfra.serve.server.openai.responses_requests import ResponsesRequest
from nanoinfra.serve.server.preprocess import Preprocessor, no_such_model

PULSE = 0.2                                  # seconds from one look at the scheduler to the next
MOST_WATCHERS = 32                           # who look at the same time; a look has no end
READ = ["GET", "HEAD"]
STORED = {"{name}": [*READ, "DELETE"], "{name}/input_items": READ, "{name}/cancel": ["POST"]}
PAGE = Path(__file__).with_name("page") / "page.html"
PAGES = {"/": PAGE.name, **{f"/{name}": name for name in ("page.css", "page.js", "chat.js", "scheduler.js")}}
ALONE = {"Content-Security-Policy":          # it loads nothing from elsewhere, and no other page frames it
         "default-src 'self'; img-src data:; frame-ancestors 'none'", "Cache-Control": "no-cache"}


def build(worker: Worker, name: str, access: Access | None = None) -> FastAPI:
    """The app, which starts and stops `worker`; clients call the model `name`, `access` says who may.

    Set `app.state.draining`, and what is new is refused.
    """
    @asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield
        worker.stop()
        await asyncio.to_thread(app.state.preprocessor.close)
        await worker.join()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  redirect_slashes=False)    # it would redirect to whatever the client calls Host
    app.state.worker, app.state.name, app.state.access = worker, name, access or Access()
    app.state.preprocessor = Preprocessor()
    app.state.draining, app.state.since, app.state.watchers = False, int(time.time()), 0
    for path, answer in {"/health": _health, "/metrics": _metrics, "/stats": _stats,
                         **dict.fromkeys(PAGES, _page)}.items():
        app.add_api_route(path, answer, methods=READ)
    known = [Depends(_known)]
    for path, answer in {"/v1/models": _models, "/v1/models/{id:path}": _model}.items():
        app.add_api_route(path, answer, methods=READ, dependencies=known)
    for path, answer in {"/v1/completions": _completions, "/v1/chat/completions": _chat,
                         "/v1/responses": _responses, "/reset_prefix_cache": _reset}.items():
        app.add_api_route(path, answer, methods=["POST"], dependencies=known)
    for path, methods in STORED.items():
        app.add_api_route(f"/v1/responses/{path}", _not_stored, methods=methods, dependencies=known)
    for error, answer in {Refused: _refused, HTTPException: _http, ClientDisconnect: _gone,
                          Exception: _bug}.items():
        app.add_exception_handler(error, answer)
    app.state.paths = [route.path for route in app.routes if "{" not in route.path]
    if app.state.access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=app.state.access.origins, allow_headers=["*"],
                           allow_methods=[*READ, "POST"], expose_headers=[HEADER])
    app.add_middleware(AccessMiddleware, access=app.state.access)
    app.add_middleware(RequestIdMiddleware)                              # the last is asked first
    return app


class Watched(StreamingResponse):
    """A stream that is counted while it lasts."""

    async def __call__(self, scope, receive, send):
        state = scope["app"].state
        state.watchers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            state.watchers -= 1


async def _completions(request: Request):
    return await exchange(request, Completion, CompletionAnswer, "cmpl-")


async def _chat(request: Request):
    return await exchange(request, Chat, ChatAnswer, "chatcmpl-")


async def _responses(request: Request):
    return await exchange(request, ResponsesRequest, ResponsesAnswer, "resp_")


async def _not_stored(request: Request):
    raise Refused(404, f"there is no response {request.path_params['name']!r:.200} here: answers are not "
                       "stored; send the turns themselves as input")


async def _models(request: Request):
    return JSONResponse({"object": "list", "data": [_described(request.app.state)]})


async def _model(request: Request):
    asked, served = request.path_params["id"], request.app.state.name
    if asked != served:
        raise no_such_model(asked, served)
    return JSONResponse(_described(request.app.state))


def _described(state):
    return {"id": state.name, "object": "model", "created": state.since, "owned_by": "nanoinfra",
            "root": state.name, "parent": None, "max_model_len": at_work(state).ready.info["context"]}


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
    if request.app.state.watchers >= MOST_WATCHERS:
        raise Refused(503, f"{MOST_WATCHERS} watch already; close one of their pages")
    how = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-cache"}}
    return Response(**how) if request.method == "HEAD" else Watched(looks(request.app.state), **how)


async def _page(request: Request):
    return FileResponse(PAGE.with_name(PAGES[request.scope["path"]]), headers=ALONE)


async def _known(request: Request):
    """Does the client have a key? It may come with a salt, for what its requests share."""
    access, request.state.salt = request.app.state.access, ""
    if not access.keys:
        return
    key = key_of(access.keys, request.headers.get("authorization", ""))
    if key is None:
        raise Refused(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                      code="invalid_api_key")
    if access.salt_per_key:
        request.state.salt = salt_of(key)


async def _refused(request, why: Refused):
    if why.status == 500:
        log_failure(request.scope, why)
    return JSONResponse(why.body(), why.status, why.headers())


async def _http(request, error: HTTPException):
    """A path or a method that is not there."""
    path, headers, detail = request.scope["path"], dict(error.headers or {}), error.detail
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": f"{headers['Allow']}, OPTIONS"})
    if error.status_code == 404:
        detail = f"not found; {where_else(path, request.app.state.paths)}"
    why = Refused(error.status_code, f"{request.method} {path}: {detail}")
    return JSONResponse(why.body(), why.status, headers)


async def _gone(request, error):
    return Response(status_code=499)         # to nobody: the client has closed the connection


async def _bug(request, error):
    """Our mistake; uvicorn writes down where. No middleware sees this answer."""
    why = Refused(500, "the server made a mistake; its log says more")
    log_failure(request.scope, why)
    return JSONResponse(why.body(), 500, {HEADER: request.scope["state"][HEADER]})
