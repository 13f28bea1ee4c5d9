"""The HTTP application (FastAPI): OpenAI's API over the engine client, Prometheus metrics, and a web page.

Every request gets an answer with an x-request-id. Errors: 400 with the reason, 401, 404 and 413; 403 and
415 come from http/access_control.py; 429 when too many requests wait; 503 while the engine loads or
restarts, and while the server shuts down. /health, /metrics and the page need no API key.
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

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.processes.engine_client import EngineClient
from nanoinfra.serve.server.generation_handlers import handle_generation_request, require_ready_engine
from nanoinfra.serve.server.http.access_control import AccessControlMiddleware, AccessPolicy
from nanoinfra.serve.server.http.api_keys import cache_salt_of_key, find_bearer_key
from nanoinfra.serve.server.http.request_ids import REQUEST_ID_HEADER, RequestIdMiddleware, log_server_error
from nanoinfra.serve.server.http.unserved_routes import suggest_served_path
from nanoinfra.serve.server.openai.completion_requests import ChatCompletionRequest, CompletionRequest
from nanoinfra.serve.server.openai.completion_responses import (
    ChatCompletionResponse,
    CompletionResponse,
    encode_sse_event,
)
from nanoinfra.serve.server.openai.responses_api_output import ResponsesResponse
from nanoinfra.serve.server.openai.responses_api_requests import ResponsesRequest
from nanoinfra.serve.server.preprocess_requests import RequestPreprocessor, model_not_found_error

_STATS_INTERVAL_SECONDS = 0.2                # seconds from one message of /stats to the next
_MAX_STATS_STREAMS = 32                      # streams of /stats at the same time; such a stream has no end
_READ_METHODS = ["GET", "HEAD"]
_STORED_RESPONSE_ROUTES = {"{name}": [*_READ_METHODS, "DELETE"], "{name}/input_items": _READ_METHODS,
                           "{name}/cancel": ["POST"]}
_PAGE = Path(__file__).with_name("page") / "page.html"
_PAGE_FILES = {"/": _PAGE.name,
               **{f"/{name}": name for name in ("page.css", "page.js", "chat.js", "scheduler.js")}}
_PAGE_HEADERS = {"Content-Security-Policy":  # nothing from other origins, and no frames
                 "default-src 'self'; img-src data:; frame-ancestors 'none'", "Cache-Control": "no-cache"}


def build_app(engine_client: EngineClient, served_model_name: str,
              access_policy: AccessPolicy | None = None) -> FastAPI:
    """The application. Its lifespan starts and stops `engine_client`.

    `served_model_name` is what clients call the model; `access_policy` says who may send requests. While
    `app.state.draining` is true, new requests are refused with 503 (graceful shutdown).
    """
    @asynccontextmanager
    async def lifespan(app):
        engine_client.start()
        yield
        engine_client.stop()
        await asyncio.to_thread(app.state.preprocessor.close)
        await engine_client.join()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  redirect_slashes=False)    # a redirect would use the client's own Host header
    app.state.engine_client, app.state.served_model_name = engine_client, served_model_name
    app.state.access_policy = access_policy or AccessPolicy()
    app.state.preprocessor = RequestPreprocessor()
    app.state.created = int(time.time())
    app.state.draining = False
    app.state.num_stats_streams = 0
    _add_routes(app)
    for error, answer in {APIError: _answer_api_error, HTTPException: _answer_http_exception,
                          ClientDisconnect: _answer_disconnect, Exception: _answer_server_error}.items():
        app.add_exception_handler(error, answer)
    if app.state.access_policy.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=app.state.access_policy.allowed_origins,
                           allow_headers=["*"], allow_methods=[*_READ_METHODS, "POST"],
                           expose_headers=[REQUEST_ID_HEADER])
    app.add_middleware(AccessControlMiddleware, policy=app.state.access_policy)
    app.add_middleware(RequestIdMiddleware)  # the middleware added last runs first
    return app


def _add_routes(app):
    for path, answer in {"/health": _health, "/metrics": _metrics, "/stats": _stats,
                         **dict.fromkeys(_PAGE_FILES, _page)}.items():
        app.add_api_route(path, answer, methods=_READ_METHODS)
    authenticated = [Depends(_authenticate)]
    for path, answer in {"/v1/models": _list_models, "/v1/models/{id:path}": _show_model}.items():
        app.add_api_route(path, answer, methods=_READ_METHODS, dependencies=authenticated)
    for path, answer in {"/v1/completions": _completions, "/v1/chat/completions": _chat_completions,
                         "/v1/responses": _responses, "/reset_prefix_cache": _reset_prefix_cache}.items():
        app.add_api_route(path, answer, methods=["POST"], dependencies=authenticated)
    for path, methods in _STORED_RESPONSE_ROUTES.items():
        app.add_api_route(f"/v1/responses/{path}", _not_stored, methods=methods, dependencies=authenticated)
    app.state.served_paths = [route.path for route in app.routes if "{" not in route.path]


class _CountedStreamingResponse(StreamingResponse):
    """A streaming response that is counted in `num_stats_streams` while it lasts."""

    async def __call__(self, scope, receive, send):
        state = scope["app"].state
        state.num_stats_streams += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            state.num_stats_streams -= 1


async def _completions(request: Request):
    return await handle_generation_request(request, CompletionRequest, CompletionResponse, "cmpl-")


async def _chat_completions(request: Request):
    return await handle_generation_request(request, ChatCompletionRequest, ChatCompletionResponse,
                                           "chatcmpl-")


async def _responses(request: Request):
    return await handle_generation_request(request, ResponsesRequest, ResponsesResponse, "resp_")


async def _not_stored(request: Request):
    raise APIError(404, f"there is no response {request.path_params['name']!r:.200} here: answers are not "
                   "stored; send the turns themselves as input")


async def _list_models(request: Request):
    return JSONResponse({"object": "list", "data": [_model_card(request.app.state)]})


async def _show_model(request: Request):
    requested, served = request.path_params["id"], request.app.state.served_model_name
    if requested != served:
        raise model_not_found_error(requested, served)
    return JSONResponse(_model_card(request.app.state))


def _model_card(state):
    return {"id": state.served_model_name, "object": "model", "created": state.created,
            "owned_by": "nanoinfra", "root": state.served_model_name, "parent": None,
            "max_model_len": require_ready_engine(state).engine_ready.info["context"]}


async def _reset_prefix_cache(request: Request):
    require_ready_engine(request.app.state).reset_prefix_cache()
    return Response()


async def _health(request: Request):
    require_ready_engine(request.app.state)
    return Response()


async def _metrics(request: Request):
    return Response(request.app.state.engine_client.metrics.prometheus_text(),
                    media_type="text/plain; version=0.0.4")


async def _stats(request: Request):
    """Stream the state and the statistics of the scheduler, for the page, as server-sent events."""
    async def send_stats(state):
        while not state.draining and (engine_client := state.engine_client).state != "stopped":
            chat = engine_client.engine_ready is None or engine_client.engine_ready.chat_template is not None
            yield encode_sse_event({"model": state.served_model_name, "state": engine_client.state,
                                    "chat": chat, **engine_client.stats})
            await asyncio.sleep(_STATS_INTERVAL_SECONDS)
    if request.app.state.num_stats_streams >= _MAX_STATS_STREAMS:
        raise APIError(503, f"{_MAX_STATS_STREAMS} watch already; close one of their pages")
    sse = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-cache"}}
    if request.method == "HEAD":
        return Response(**sse)
    return _CountedStreamingResponse(send_stats(request.app.state), **sse)


async def _page(request: Request):
    return FileResponse(_PAGE.with_name(_PAGE_FILES[request.scope["path"]]), headers=_PAGE_HEADERS)


async def _authenticate(request: Request):
    """Authenticate the client, and set the cache salt of its requests. Raises APIError (401)."""
    access_policy, request.state.cache_salt = request.app.state.access_policy, ""
    if not access_policy.api_keys:
        return
    key = find_bearer_key(access_policy.api_keys, request.headers.get("authorization", ""))
    if key is None:
        raise APIError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                       code="invalid_api_key")
    if access_policy.cache_salt_per_key:
        request.state.cache_salt = cache_salt_of_key(key)


async def _answer_api_error(request, error: APIError):
    if error.status_code == 500:
        log_server_error(request.scope, error)
    return JSONResponse(error.error_body(), error.status_code, error.retry_headers())


async def _answer_http_exception(request, error: HTTPException):
    """Answer a path or a method that does not exist."""
    path, detail = request.scope["path"], error.detail
    headers = dict(error.headers or {})
    if "Allow" in headers:
        headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"Allow": f"{headers['Allow']}, OPTIONS"})
    if error.status_code == 404:
        detail = f"not found; {suggest_served_path(path, request.app.state.served_paths)}"
    error = APIError(error.status_code, f"{request.method} {path}: {detail}")
    return JSONResponse(error.error_body(), error.status_code, headers)


async def _answer_disconnect(request, error):
    return Response(status_code=499)         # nobody reads it: the client has closed the connection


async def _answer_server_error(request, error):
    """Answer an unexpected exception. uvicorn logs the traceback. The middlewares do not see this answer."""
    error = APIError(500, "the server made a mistake; its log says more")
    log_server_error(request.scope, error)
    return JSONResponse(error.error_body(), 500,
                        {REQUEST_ID_HEADER: request.scope["state"][REQUEST_ID_HEADER]})
