"""A uvicorn server with a graceful shutdown (draining) in two steps.

After a signal, new requests are refused with 503. When all running requests have ended, or when the timeout
is over, the server closes. uvicorn alone would close the port at once, so that clients and load balancers
see no 503, and would end the process by the signal.
"""
import socket
import sys
from time import monotonic

import uvicorn
from fastapi import FastAPI

from nanoinfra.serve.server.http.connection_limits import (
    LISTEN_BACKLOG,
    MAX_ACCEPTS_AT_ONCE,
    ConnectionLimits,
    http_protocol_factory,
)
from nanoinfra.serve.server.http.log_filters import count_repeated_log_lines, escape_unprintable

_CONNECTION_CLOSE_SECONDS = 5                # that connections have at the end to close


class GracefulServer(uvicorn.Server):
    """Serves `app` until a signal comes and then no request runs, or `shutdown_timeout` seconds are over."""

    def __init__(self, app: FastAPI, shutdown_timeout: float,
                 connection_limits: ConnectionLimits | None = None):
        connection_limits = connection_limits or ConnectionLimits()
        super().__init__(uvicorn.Config(app, http=http_protocol_factory(connection_limits), ws="none",
                                        lifespan="on", log_config=None, log_level="warning", access_log=False,
                                        backlog=MAX_ACCEPTS_AT_ONCE,
                                        timeout_keep_alive=connection_limits.keepalive_timeout,
                                        timeout_graceful_shutdown=_CONNECTION_CLOSE_SECONDS))
        self.app_state, self.engine_client = app.state, app.state.engine_client
        self.shutdown_timeout, self.deadline = shutdown_timeout, float("inf")
        self.reported_state = self.engine_client.state       # of the engine, as last printed

    def run(self, sockets: list[socket.socket]) -> None:
        """Serve on `sockets`, which are already bound; returns after the shutdown."""
        with count_repeated_log_lines():
            super().run(sockets)

    async def startup(self, sockets: list[socket.socket]) -> None:
        """As uvicorn's, then set each socket's listen backlog, as Config's is the number of accepts."""
        await super().startup(sockets)
        for listener in sockets:
            listener.listen(LISTEN_BACKLOG)

    def handle_exit(self, sig: int, frame) -> None:
        """On the first signal, let running requests end. On a second one, end them."""
        self.deadline = 0.0 if self.app_state.draining else monotonic() + self.shutdown_timeout
        self.app_state.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: print a new state of the engine; True when the server should exit."""
        if self.engine_client.state != self.reported_state and self.engine_client.state != "failed":
            self.reported_state = self.engine_client.state
            print("nanoinfra:", escape_unprintable(self.engine_client.state_reason) or "ready",
                  file=sys.stderr,
                  flush=True)
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                connection.close_if_timed_out(monotonic())
        finished = self.app_state.draining and not self.engine_client.streams
        if finished or self.engine_client.load_error or monotonic() > self.deadline:
            self.engine_client.stop()        # unfinished requests get an error now
            self.should_exit = True
        return await super().on_tick(counter)
