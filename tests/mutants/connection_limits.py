"""Known-wrong doors: connections without a time limit or a cap, chunks of any size, a log that anybody fills.

`left` opens connections to a server without an engine; `written` logs lines.
"""
import contextlib
import logging
import socket
import threading
from dataclasses import replace
from time import monotonic, sleep

import h11
import httpx

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.server.fastapi_app import build_app
from nanoinfra.serve.server.http.connection_limits import (
    ChunkLimitedH11Connection,
    ConnectionLimits,
    TimeLimitedHTTPConnection,
)
from nanoinfra.serve.server.http.log_filters import RepeatedLogFilter, count_repeated_log_lines
from nanoinfra.serve.server.http.uvicorn_graceful_shutdown import GracefulServer
from nanoinfra.serve.server.launch_server import create_server_socket
from tests.serve.fake import Idle

connections, logs = Check("connections"), Check("logs")
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LATE = 5.0                                   # seconds after which what is to be closed is closed


@contextlib.contextmanager
def served(limits):
    """(port, server) of a server without an engine."""
    listener = create_server_socket("127.0.0.1", 0)
    server = GracefulServer(build_app(Idle(), "fake"), 1.0, limits)
    server.config.timeout_graceful_shutdown = 0.2
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            sleep(0.01)
        yield listener.getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def left(sends, count=1, **limits):
    """The connections still open when `count` have sent `sends`, and all that are to be closed had the time.

    Another client asks after them, and is answered: those before have been accepted then.
    """
    with served(ConnectionLimits(**limits)) as (port, server), contextlib.ExitStack() as stack:
        for _ in range(count):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            each.sendall(sends)
        httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
        end, most = monotonic() + LATE, limits.get("max_connections", 0)
        while monotonic() < end and len(server.server_state.connections) > most:
            sleep(0.02)
        return len(server.server_state.connections)


@connections.criterion("a head that does not come is not waited for", "property")
def _(subject):
    for sends in (b"", b"G"):
        if open_ := subject(sends, client_header_timeout=1.0):
            raise CriterionNotMet(f"{open_} connection that sent {sends} is open long after the time it has")


@connections.criterion("a body that does not come is not waited for", "property")
def _(subject):
    if open_ := subject(HEAD + b"Content-Length: 9\r\n\r\n", client_body_timeout=1.0):
        raise CriterionNotMet(f"{open_} connection that sent a head is open long after the time its body has")


@connections.criterion("the oldest make room for the newest", "property")
def _(subject):
    if (open_ := subject(b"G", 50, max_connections=20)) > 20:
        raise CriterionNotMet(f"of 50 connections {open_} are open, want at most 20")


@connections.criterion("a body of small chunks is an error", "property")
def _(subject):
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 3000
    if subject(chunked):
        raise CriterionNotMet("3000 chunks of a byte are read, and more waited for")


def written(lines):
    """What the log has of `lines`, all from one place."""
    got, logger = [], logging.getLogger("nanoinfra.serve")
    handler = logging.Handler()
    handler.emit = lambda record: got.append(record.getMessage())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with count_repeated_log_lines():
            for line in lines:
                logger.warning("%s", line)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    return got


@logs.criterion("a line that repeats is counted", "property")
def _(subject):
    got = subject(map(str, range(1000)))
    if len(got) > 12 or "512" not in got[-1]:
        raise CriterionNotMet(f"of 1000 lines {len(got)} are written, the last {got[-1]!r}")


@logs.criterion("nobody writes a line of his own", "property")
def _(subject):
    if (got := subject(["a\nb\x1b[2J"])) != [r"a\nb\x1b[2J"]:
        raise CriterionNotMet(f"a line end and an escape are written as {got}")


class WaitsForEver(TimeLimitedHTTPConnection):
    def close_if_timed_out(self, now):
        pass


class WaitsForBodies(TimeLimitedHTTPConnection):
    def close_if_timed_out(self, now):
        if self.conn.their_state is not h11.SEND_BODY:
            super().close_if_timed_out(now)


class KeepsAll(TimeLimitedHTTPConnection):
    def __init__(self, limits, *more, **uvicorns):
        super().__init__(replace(limits, max_connections=1 << 30), *more, **uvicorns)


class AnyChunks(ChunkLimitedH11Connection):
    def next_event(self):
        self.num_chunks = 0
        return super().next_event()


class WritesAll(RepeatedLogFilter):
    def filter(self, record):
        self.counts.clear()
        return super().filter(record)


NO_HEAD, NO_BODY, ROOM, CHUNKS = (c.name for c in connections.criteria)
COUNTED, OF_HIS_OWN = (c.name for c in logs.criteria)
DOOR, LOG = "nanoinfra.serve.server.http.connection_limits", "nanoinfra.serve.server.http.log_filters"
MUTANTS = [
    Mutant("no time limits", connections, patched(left, f"{DOOR}:TimeLimitedHTTPConnection", WaitsForEver),
           NO_HEAD),
    Mutant("no time limit for bodies", connections,
           patched(left, f"{DOOR}:TimeLimitedHTTPConnection", WaitsForBodies), NO_BODY),
    Mutant("no cap", connections, patched(left, f"{DOOR}:TimeLimitedHTTPConnection", KeepsAll), ROOM),
    Mutant("chunks of any size", connections, patched(left, f"{DOOR}:ChunkLimitedH11Connection", AnyChunks),
           CHUNKS),
    Mutant("every line is written", logs, patched(written, f"{LOG}:RepeatedLogFilter", WritesAll), COUNTED),
    Mutant("lines are written as they come", logs, patched(written, f"{LOG}:escape_unprintable", str),
           OF_HIS_OWN),
]
