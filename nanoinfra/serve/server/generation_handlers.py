"""Handle one generation request: read the body, ask the engine, send one JSON object or a stream of events.

When the client disconnects, its requests are cancelled (aborted), so that the engine frees their KV blocks;
http/connection_limits.py closes connections that send or read nothing for too long. Clients and proxies
give up when nothing arrives for long. So a response starts in time, even before the first token, and sends
keep-alive bytes while the engine works.
"""
import asyncio
import functools
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import State
from starlette.requests import ClientDisconnect

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import RequestOutput
from nanoinfra.serve.processes.engine_client import EngineClient
from nanoinfra.serve.processes.response_stream import ResponseStream
from nanoinfra.serve.server.http.api_keys import prepend_cache_salt
from nanoinfra.serve.server.http.request_ids import log_server_error
from nanoinfra.serve.server.openai.completion_requests import BaseCompletionRequest
from nanoinfra.serve.server.openai.completion_responses import BaseCompletionResponse
from nanoinfra.serve.server.preprocess_requests import LARGE_BODY_BYTES, RequestPreprocessor
from nanoinfra.serve.server.request_limits import max_body_bytes

_BODY_CHUNK_BYTES = 1 << 16                  # bytes of a JSON response sent at once
_STREAM_START_TIMEOUT_SECONDS = 10.0         # then a stream starts, even without an output
_JSON_START_TIMEOUT_SECONDS = 50.0           # a JSON object: later, as errors need a status
_KEEP_ALIVE_INTERVAL_SECONDS = 15.0          # event streams' usual interval
_STREAM_KEEP_ALIVE = b": keep-alive\n\n"     # an SSE comment
_JSON_KEEP_ALIVE = b" "                      # JSON may begin with spaces
_NO_OUTPUT_YET = object()                    # in place of an output


async def handle_generation_request(http_request: Request, request_type: type[BaseCompletionRequest],
                                    response_type: type[BaseCompletionResponse], id_prefix: str) -> Response:
    """Answer a body of `request_type` with a response of `response_type`, whose id starts with `id_prefix`.

    The response starts with the first output, or after a timeout: until then an error can still have its
    own HTTP status. Raises APIError, and ClientDisconnect when the client has gone.
    """
    app_state, response_id = http_request.app.state, id_prefix + uuid.uuid4().hex
    preprocessor, ready = app_state.preprocessor, require_ready_engine(app_state).engine_ready
    with ExitStack() as body_slots:
        body = await _read_body(http_request, max_body_bytes(ready.info["context"]),
                                lambda: body_slots.enter_context(preprocessor.reserve_large_body_slot()))
        response = await preprocessor.parse_and_tokenize(request_type, response_type, body, response_id,
                                                         app_state.served_model_name, ready)
    engine_requests = prepend_cache_salt([*response.engine_requests.values()], http_request.state.cache_salt)
    stream = require_ready_engine(app_state).submit_requests(engine_requests)
    try:
        start = _start_event_stream if response.request.stream else _start_json
        return await start(http_request, response, stream, preprocessor)
    except BaseException:
        stream.close()
        raise


async def _start_event_stream(http_request, response: BaseCompletionResponse, stream: ResponseStream,
                              preprocessor: RequestPreprocessor) -> Response:
    first = await _unless_disconnected(http_request, anext(stream), _STREAM_START_TIMEOUT_SECONDS)
    chunks = _stream_chunks(response, stream, first, preprocessor, http_request.scope)
    return _StreamClosingResponse(stream, chunks, "text/event-stream", {"Cache-Control": "no-cache"})


async def _start_json(http_request, response: BaseCompletionResponse, stream: ResponseStream,
                      preprocessor: RequestPreprocessor) -> Response:
    collected = _collect_outputs(response, stream)
    if not await _unless_disconnected(http_request, collected, _JSON_START_TIMEOUT_SECONDS):
        chunks = _late_json(response, stream, preprocessor, http_request.scope)
        return _StreamClosingResponse(stream, chunks, "application/json", {})
    encode = response.encode_response_object
    body = await preprocessor.encode_response(response.num_tokens, encode, response)
    headers = {"Content-Length": str(len(body))}
    return _StreamClosingResponse(stream, _split_body(body), "application/json", headers)


def require_ready_engine(app_state: State) -> EngineClient:
    """The engine client of the app. Raises APIError (503) while the engine is not ready."""
    if app_state.draining:
        raise APIError(503, "the server is about to end")
    if app_state.engine_client.state != "ready":
        raise APIError(503, app_state.engine_client.state_reason)
    return app_state.engine_client


class _StreamClosingResponse(StreamingResponse):
    """A response that closes its ResponseStream at its end, so that unfinished requests are cancelled."""

    def __init__(self, stream: ResponseStream, chunks: AsyncIterator[bytes], media_type: str,
                 headers: dict[str, str]):
        super().__init__(chunks, media_type=media_type, headers=headers)
        self.stream = stream

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        except APIError:                     # _late_json has logged it; uvicorn closes the connection of an
            pass                             #   incomplete response, and so the client sees that it failed
        finally:
            self.stream.close()


async def _read_body(http_request, max_bytes: int, on_large_body: Callable[[], None]):
    """The body of the request. Raises APIError (413) for more than `max_bytes`.

    `on_large_body` is called once, when the body becomes larger than LARGE_BODY_BYTES. A refused body is
    read to its end, or to 16 times `max_bytes`: few clients read a response before all is sent.
    """
    body, size = bytearray(), 0
    refused = None
    async for chunk in http_request.stream():
        old_size, size = size, size + len(chunk)
        refused = refused or _body_error(old_size, size, max_bytes, on_large_body)
        if size > 16 * max_bytes:
            break
        body += b"" if refused else chunk
    if refused:
        raise refused
    return bytes(body)


def _body_error(old_size, size, max_bytes, on_large_body):
    if size > max_bytes:
        return APIError(413, f"the body is larger than {max_bytes} bytes; send less at once")
    try:
        if old_size <= LARGE_BODY_BYTES < size:
            on_large_body()
    except APIError as error:
        return error
    return None


async def _unless_disconnected(http_request, work, timeout):
    """The result of `work`; None after `timeout` seconds. Raises ClientDisconnect when it has gone."""
    disconnect = http_request.receive()      # after the body, only http.disconnect can come
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnect)]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        if tasks[1].done():
            raise ClientDisconnect
        return None                          # outputs stay in the queue of the ResponseStream
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _collect_outputs(response: BaseCompletionResponse, stream: ResponseStream):
    """Add all outputs to `response`; returns True. If this is cancelled, added outputs stay there."""
    async for output in stream:
        response.add_output(output)
    return True


async def _stream_chunks(response: BaseCompletionResponse, stream: ResponseStream,
                         first: RequestOutput | None,
                         preprocessor: RequestPreprocessor, scope):
    try:
        output = first or _NO_OUTPUT_YET
        while output:
            if output is _NO_OUTPUT_YET:
                yield _STREAM_KEEP_ALIVE
            else:
                encode = functools.partial(response.encode_stream_chunk, output)
                yield await preprocessor.encode_response(len(output.prompt_logprobs), encode, response)
                await asyncio.sleep(0)       # let other tasks run, however many outputs wait
            output = await _or_no_output_yet(anext(stream, None))
        yield await preprocessor.encode_response(response.num_tokens_at_stream_end,
                                                 response.encode_stream_end, response)
    except APIError as error:                # too late for an HTTP status
        log_server_error(scope, error)
        yield response.encode_stream_error(error)


async def _late_json(response: BaseCompletionResponse, stream: ResponseStream,
                     preprocessor: RequestPreprocessor, scope):
    """The JSON object, and before it a space at every keep-alive interval until it is complete."""
    try:
        yield _JSON_KEEP_ALIVE
        while await _or_no_output_yet(_collect_outputs(response, stream)) is _NO_OUTPUT_YET:
            yield _JSON_KEEP_ALIVE
        encode = response.encode_response_object
        body = await preprocessor.encode_response(response.num_tokens, encode, response)
    except APIError as error:                # close the connection: clients would read an error as the object
        log_server_error(scope, error)
        raise
    async for chunk in _split_body(body):
        yield chunk


async def _or_no_output_yet(work):
    """The result of `work`, or _NO_OUTPUT_YET when the keep-alive interval is over."""
    try:
        async with asyncio.timeout(_KEEP_ALIVE_INTERVAL_SECONDS):
            return await work
    except TimeoutError:
        return _NO_OUTPUT_YET


async def _split_body(body: bytes):
    for start in range(0, len(body), _BODY_CHUNK_BYTES):
        yield body[start:start + _BODY_CHUNK_BYTES]
