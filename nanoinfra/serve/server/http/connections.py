"""Connections on which nothing comes take nothing from others: time limits, and a cap that closes the oldest.

Each connection is a file descriptor, of which a process has few (ulimit -n); once they are gone, asyncio
accepts nobody and logs each try. Uvicorn itself limits the time between two requests alone. The limits are
nginx's, under its names; the minimum rate is Apache's (mod_reqtimeout).
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

from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.http.request_ids import HEADER, request_id

MOST_CONNECTIONS = 2048                      # unless the engine takes more requests
BACKLOG = 2048                               # connections that may wait in the system to be accepted
ACCEPTS = 8                                  # that asyncio accepts at a time
RESERVED = 96                                # descriptors for all else: the engine's pipes, what is closing
LEAST = 16                                   # connections below which a server is none
MOST_HEAD = 16 << 10                         # bytes of a head so far, and parsed at a time: in 20 ms
MIN_RATE = 1000                              # bytes of a body in a second
MIN_CHUNK = 256                              # bytes of a body's chunks on average, after as many chunks

logger = logging.getLogger("nanoinfra.serve")


@dataclass(frozen=True)
class ConnectionLimits:
    """What a connection may take of the server's time, in seconds, and how many there may be."""
    client_header_timeout: float = 10.0      # for a head, since it was connected or its first byte came
    client_body_timeout: float = 10.0        # for a body, and one more for each MIN_RATE bytes of it
    send_timeout: float = 60.0               # that a client may leave unread what it is sent
    keepalive_timeout: float = 75.0          # for another request: more than pools and proxies (60) keep it
    max_connections: int = MOST_CONNECTIONS


def limits_here(most: int = MOST_CONNECTIONS) -> ConnectionLimits:
    """Limits with `most` connections, or as many as the system gives this process descriptors for.

    Raises the process's soft limit as far as that needs. Raises ValueError where hardly any are left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < most + RESERVED:
        soft = most + RESERVED if hard == resource.RLIM_INFINITY else min(hard, most + RESERVED)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        most = soft - RESERVED
    if most < LEAST:
        raise ValueError(f"{soft} file descriptors are too few for a server; give it at least "
                         f"{LEAST + RESERVED}: ulimit -n {LEAST + RESERVED}")
    return ConnectionLimits(max_connections=most)


def protocol_with(limits: ConnectionLimits) -> Callable[..., H11Protocol]:
    """What uvicorn calls for each connection of one server (Config's `http`)."""
    return functools.partial(Connection, limits, {})


class Connection(H11Protocol):
    """One connection. `waiting` holds those that have not sent a complete request, the longest first."""

    def __init__(self, limits: ConnectionLimits, waiting: dict, **uvicorns):
        super().__init__(**uvicorns)
        self.conn = Framing(h11.SERVER, MOST_HEAD)
        self.limits, self.waiting = limits, waiting
        self.state, self.since = None, 0.0   # of the client, as h11 has it
        self.kept = False                    # between two requests, of which the next has not begun
        self.unread_since = None             # when the client stopped to read what it is sent

    def connection_made(self, transport):
        super().connection_made(transport)
        self._note_state()
        if len(self.connections) > self.limits.max_connections:
            logger.warning("%d connections are open; the one that asks nothing for the longest is closed",
                           self.limits.max_connections)
            longest = next(iter(self.waiting))
            longest.end(Refused(503, "too many connections are open; try again"))
            longest.transport.abort()        # its descriptor is free now, whether it reads or not

    def connection_lost(self, exc):
        self.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data):
        if self.kept:                        # the next request begins: now it has the time of a head
            self.kept, self.since = False, monotonic()
            self.waiting[self] = self.waiting.pop(self, None)
        for begin in range(0, len(data), MOST_HEAD):         # h11 measures a head only while it is incomplete
            if not self.transport.is_closing():
                super().data_received(data[begin:begin + MOST_HEAD])
        self._note_state()

    def on_response_complete(self):
        super().on_response_complete()
        self._note_state()

    def pause_writing(self):
        super().pause_writing()
        self.unread_since = monotonic()

    def resume_writing(self):
        super().resume_writing()
        self.unread_since = None

    def send_400_response(self, msg):
        self.end(Refused(400, msg))

    def shutdown(self):
        """The server ends: what has been asked is answered, what is being asked is not."""
        if self in self.waiting and self.state is h11.SEND_BODY:
            return self.end(Refused(503, "the server is about to end"))
        super().shutdown()

    def check(self, now: float) -> None:
        """Close the connection if the client has taken too long; called about once a second."""
        if self.unread_since is None and self.transport.is_closing():    # the rest is still to be read
            self.unread_since = now
        if self.unread_since is not None:
            if now - self.unread_since > self.limits.send_timeout:
                self.transport.abort()
        elif self in self.waiting and now - self.since > (allowed := self._allowed()):
            came = self.state is h11.SEND_BODY or self.conn.trailing_data[0]
            self.end(Refused(408, f"the request was not complete after {allowed:.0f} s") if came else None)

    def end(self, why: Refused | None) -> None:
        """Close the connection. The client is told why, unless its answer has begun."""
        self.waiting.pop(self, None)
        if why and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            name = request_id(self.headers or () if self.state is h11.SEND_BODY else ())
            self._write(JSONResponse(why.body(), why.status, why.headers() | {"Connection": "close",
                                                                              HEADER: name}))
        if self.cycle and not self.cycle.response_complete:              # its handler learns of it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _note_state(self):
        """Is the client asking, and since when?"""
        if self.conn.their_state is self.state or self.transport.is_closing():
            return
        answered = self.state is not None
        self.state, self.since = self.conn.their_state, monotonic()
        self.kept = answered and self.state is h11.IDLE and not self.conn.trailing_data[0]
        self.waiting.pop(self, None)
        if self.state in (h11.IDLE, h11.SEND_BODY):
            self.waiting[self] = None

    def _allowed(self):
        if self.state is h11.IDLE:
            return self.limits.keepalive_timeout if self.kept else self.limits.client_header_timeout
        return self.limits.client_body_timeout + self.conn.size / MIN_RATE

    def _write(self, response):
        no_body = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
        for event in (h11.Response(status_code=response.status_code, headers=response.raw_headers),
                      h11.Data(data=b"" if no_body else response.body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))


class Framing(h11.Connection):
    """HTTP/1.1 in which many small chunks are an error: each costs what a kilobyte does."""
    chunks, size = 0, 0                      # of the body so far

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks, self.size = 0, 0
        if isinstance(event, h11.Data):
            self.chunks, self.size = self.chunks + event.chunk_end, self.size + len(event.data)
            if self.chunks > MIN_CHUNK + self.size / MIN_CHUNK:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event
