"""x-request-id: a name for each request, the client's own or a new one, in every answer and in the log.

OpenAI's clients show it with an error; who runs the server finds by it what the log says.
"""
import logging
import re
import uuid
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoinfra.serve.server.errors import Refused

HEADER = "x-request-id"
SENSIBLE = re.compile(rb"[!-~]{1,128}")      # what a client may call it: else it gets a new name

logger = logging.getLogger("nanoinfra.serve")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The name that `headers` (in lower case) give the request, or a new one."""
    given = dict(headers).get(HEADER.encode(), b"")
    return given.decode() if SENSIBLE.fullmatch(given) else uuid.uuid4().hex


def log_failure(scope: Scope, why: Refused) -> None:
    """Write down an answer that failed by no fault of the client's."""
    logger.error("%s %s: %d, %s (%s %s)", scope["method"], scope["path"], why.status, why, HEADER,
                 scope["state"][HEADER])


class RequestIdMiddleware:
    """Gives `scope["state"]` and each answer the request's name."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        name = scope.setdefault("state", {})[HEADER] = request_id(scope["headers"])

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER.encode(), name.encode())]
            await send(message)
        await self.app(scope, receive, named)
