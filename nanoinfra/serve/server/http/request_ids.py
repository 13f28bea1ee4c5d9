"""x-request-id: the id of each HTTP request, from the client or new, in every response and in the log.

OpenAI's clients show it with an error, so an operator can find the matching line of the log.
"""
import logging
import re
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoinfra.serve.api_errors import APIError

REQUEST_ID_HEADER = "x-request-id"
_VALID_REQUEST_ID = re.compile(rb"[!-~]{1,128}")             # other ids are replaced by new ones

_logger = logging.getLogger("nanoinfra.serve")


def get_or_create_request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The request id in `headers` (names in lower case), or a new one."""
    client_id = dict(headers).get(REQUEST_ID_HEADER.encode(), b"")
    return client_id.decode() if _VALID_REQUEST_ID.fullmatch(client_id) else uuid.uuid4().hex


def log_server_error(scope: Scope, error: APIError) -> None:
    """Log an error that is not the client's fault, with the request id."""
    _logger.error("%s %s: %d, %s (%s %s)", scope["method"], scope["path"], error.status_code, error,
                  REQUEST_ID_HEADER, scope["state"][REQUEST_ID_HEADER])


class RequestIdMiddleware:
    """ASGI middleware that puts the request id into `scope["state"]` and into each response."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = get_or_create_request_id(scope["headers"])
        scope.setdefault("state", {})[REQUEST_ID_HEADER] = request_id

        async def send_with_request_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()),
                                      (REQUEST_ID_HEADER.encode(), request_id.encode())]
            await send(message)
        await self.app(scope, receive, send_with_request_id)
