"""Time limits of connections, and a maximum number of them: idle clients must not block others.

Each connection needs a file descriptor, and a process has few (ulimit -n). Without any left, asyncio
accepts no client and logs every attempt. uvicorn itself only has a keep-alive timeout. The limits have
nginx's names and meaning; the minimum rate of a body is Apache's (mod_reqtimeout).
"""
import functools
import logging
import resource
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server.http.request_ids import REQUEST_ID_HEADER, get_or_create_request_id

DEFAULT_MAX_CONNECTIONS = 2048               # more if the engine takes more requests
LISTEN_BACKLOG = 2048                        # connections that the system holds until they are accepted
MAX_ACCEPTS_AT_ONCE = 8                      # connections that asyncio accepts at a time
_RESERVED_FILE_DESCRIPTORS = 96              # for the engine's pipes, closing sockets, files
_MIN_CONNECTIONS = 16                        # a server with fewer is refused
MAX_HEADER_BYTES = 16 << 10                  # of the request line and headers
_MIN_BODY_BYTES_PER_SECOND = 1000            # a slower body is a timeout
MIN_MEAN_CHUNK_BYTES = 256                   # mean size of a body's chunks, after as many chunks

_logger = logging.getLogger("nanoinfra.serve")


@dataclass(frozen=True)
class ConnectionLimits:
    """Timeouts of a connection in seconds, and the maximum number of connections."""
    client_header_timeout: float = 10.0      # for the headers, from connection or first byte
    client_body_timeout: float = 10.0        # for a body, plus its size / minimum rate
    send_timeout: float = 60.0               # while a client does not read the response
    keepalive_timeout: float = 75.0          # for the next request; clients and proxies use 60
    max_connections: int = DEFAULT_MAX_CONNECTIONS


def connection_limits_within_ulimit(max_connections: int = DEFAULT_MAX_CONNECTIONS) -> ConnectionLimits:
    """Limits with `max_connections`, or fewer if the process may not have so many file descriptors.

    Raises the soft limit (ulimit -n) as far as needed. ValueError if too few descriptors are left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_connections + _RESERVED_FILE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        max_connections = soft - _RESERVED_FILE_DESCRIPTORS
    if max_connections < _MIN_CONNECTIONS:
        least = _MIN_CONNECTIONS + _RESERVED_FILE_DESCRIPTORS
        raise ValueError(f"{soft} file descriptors are too few for a server; give it at least {least}: "
                         f"ulimit -n {least}")
    return ConnectionLimits(max_connections=max_connections)


def http_protocol_factory(limits: ConnectionLimits) -> Callable[..., H11Protocol]:
    """The protocol factory of one server (uvicorn.Config's `http`): uvicorn calls it for each connection."""
    return functools.partial(TimeLimitedHTTPConnection, limits, {})


class TimeLimitedHTTPConnection(H11Protocol):
    """One HTTP connection with time limits.

    `awaiting_request` is shared by all connections of a server. It holds those without a complete
    request, the one that waits longest first. States are h11's.
    """

    def __init__(self, limits: ConnectionLimits, awaiting_request: dict, **uvicorn_args):
        super().__init__(**uvicorn_args)
        self.conn = ChunkLimitedH11Connection(h11.SERVER, MAX_HEADER_BYTES)
        self.limits, self.awaiting_request = limits, awaiting_request
        self.client_state, self.state_since = None, 0.0      # h11's state of the client
        self.is_idle_keepalive = False       # between two requests
        self.write_blocked_since = None      # since when the client does not read

    def connection_made(self, transport):
        super().connection_made(transport)
        self._note_state()
        if len(self.connections) > self.limits.max_connections:
            _logger.warning("%d connections are open; the one that asks nothing for the longest is closed",
                            self.limits.max_connections)
            longest = next(iter(self.awaiting_request))
            longest.close_with_error(APIError(503, "too many connections are open; try again"))
            longest.transport.abort()        # frees its descriptor even if the client does not read

    def connection_lost(self, exc):
        self.awaiting_request.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data):
        if self.is_idle_keepalive:           # the next request begins: client_header_timeout applies
            self.is_idle_keepalive, self.state_since = False, monotonic()
            self.awaiting_request[self] = self.awaiting_request.pop(self, None)
        for begin in range(0, len(data), MAX_HEADER_BYTES):  # h11 limits headers while they are incomplete
            if not self.transport.is_closing():
                super().data_received(data[begin:begin + MAX_HEADER_BYTES])
        self._note_state()

    def on_response_complete(self):
        super().on_response_complete()
        self._note_state()

    def pause_writing(self):
        super().pause_writing()
        self.write_blocked_since = monotonic()

    def resume_writing(self):
        super().resume_writing()
        self.write_blocked_since = None

    def send_400_response(self, msg):
        self.close_with_error(APIError(400, msg))

    def shutdown(self):
        """Called when the server shuts down. Complete requests are answered, incomplete ones get 503."""
        if self in self.awaiting_request and self.client_state is h11.SEND_BODY:
            return self.close_with_error(APIError(503, "the server is about to end"))
        super().shutdown()

    def close_if_timed_out(self, now: float) -> None:
        """Close the connection if a time limit is over; called about once a second with time.monotonic()."""
        if self.write_blocked_since is None and self.transport.is_closing():
            self.write_blocked_since = now   # the client has still to read the rest
        if self.write_blocked_since is not None:
            if now - self.write_blocked_since > self.limits.send_timeout:
                self.transport.abort()
        elif self in self.awaiting_request and now - self.state_since > (timeout := self._timeout()):
            has_begun = self.client_state is h11.SEND_BODY or self.conn.trailing_data[0]
            late = APIError(408, f"the request was not complete after {timeout:.0f} s")
            self.close_with_error(late if has_begun else None)

    def close_with_error(self, error: APIError | None) -> None:
        """Close the connection, and send `error` first unless a response has already begun."""
        self.awaiting_request.pop(self, None)
        if error and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = self.headers or () if self.client_state is h11.SEND_BODY else ()
            request_id = get_or_create_request_id(headers)
            self._write(JSONResponse(error.error_body(), error.status_code, error.retry_headers() | {
                "Connection": "close", REQUEST_ID_HEADER: request_id}))
        if self.cycle and not self.cycle.response_complete:  # tell the handler that the client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _note_state(self):
        """Note h11's state of the client, since when it holds, and whether a request is awaited."""
        if self.conn.their_state is self.client_state or self.transport.is_closing():
            return
        answered = self.client_state is not None
        self.client_state, self.state_since = self.conn.their_state, monotonic()
        self.is_idle_keepalive = answered and self.client_state is h11.IDLE and not self.conn.trailing_data[0]
        self.awaiting_request.pop(self, None)
        if self.client_state in (h11.IDLE, h11.SEND_BODY):
            self.awaiting_request[self] = None

    def _timeout(self):
        if self.client_state is not h11.IDLE:
            return self.limits.client_body_timeout + self.conn.num_body_bytes / _MIN_BODY_BYTES_PER_SECOND
        return self.limits.keepalive_timeout if self.is_idle_keepalive else self.limits.client_header_timeout

    def _write(self, response):
        no_body = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        for event in (h11.Response(status_code=response.status_code, headers=response.raw_headers),
                      h11.Data(data=b"" if no_body else response.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))


class ChunkLimitedH11Connection(h11.Connection):
    """h11's HTTP/1.1, where many small chunks are an error: parsing one takes as long as a kilobyte."""
    num_chunks, num_body_bytes = 0, 0        # of the current body

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks, self.num_body_bytes = 0, 0
        if isinstance(event, h11.Data):
            self.num_chunks += event.chunk_end
            self.num_body_bytes += len(event.data)
            if self.num_chunks > MIN_MEAN_CHUNK_BYTES + self.num_body_bytes / MIN_MEAN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event
