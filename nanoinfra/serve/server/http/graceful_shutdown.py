"""A uvicorn server that ends in two steps: refuse what is new, then close when what runs has ended.

Uvicorn's own way closes the port at once, so that clients and load balancers see no 503, and ends the process
by the signal that it got.
"""
import socket
import sys
from time import monotonic

import uvicorn
from fastapi import FastAPI

from nanoinfra.serve.server.http.connections import ACCEPTS, BACKLOG, ConnectionLimits, protocol_with
from nanoinfra.serve.server.http.logs import counted_logs, visible

CLOSING = 5                                  # seconds that connections have to close when all is said


class Server(uvicorn.Server):
    """Serves `app` (server.build) until a signal comes and nothing runs, or `limit` seconds after it."""

    def __init__(self, app: FastAPI, limit: float, connections: ConnectionLimits | None = None):
        connections = connections or ConnectionLimits()
        super().__init__(uvicorn.Config(app, http=protocol_with(connections), ws="none", lifespan="on",
                                        log_config=None, log_level="warning", access_log=False,
                                        backlog=ACCEPTS, timeout_keep_alive=connections.keepalive_timeout,
                                        timeout_graceful_shutdown=CLOSING))
        self.state, self.worker, self.limit = app.state, app.state.worker, limit
        self.deadline, self.said = float("inf"), self.worker.state

    def run(self, sockets: list[socket.socket]) -> None:
        """Serve on `sockets`."""
        with counted_logs():
            super().run(sockets)

    async def startup(self, sockets: list[socket.socket]) -> None:
        """Uvicorn's, which has told the system to hold no more connections than are accepted at a time."""
        await super().startup(sockets)
        for each in sockets:
            each.listen(BACKLOG)

    def handle_exit(self, sig: int, frame) -> None:
        """A signal: let running requests end. A second one: do not."""
        self.deadline = 0.0 if self.state.draining else monotonic() + self.limit
        self.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it over? Also says how the engine stands, when that changes."""
        if self.worker.state != self.said and self.worker.state != "failed":
            self.said = self.worker.state
            print("nanoinfra:", visible(self.worker.why) or "ready", file=sys.stderr, flush=True)
        if counter % 10 == 0:
            for connection in list(self.server_state.connections):
                connection.check(monotonic())
        over = self.state.draining and not self.worker.jobs
        if over or self.worker.failed or monotonic() > self.deadline:
            self.worker.stop()               # who still waits for an answer gets an error now
            self.should_exit = True
        return await super().on_tick(counter)
