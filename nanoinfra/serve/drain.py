"""A uvicorn server that ends in two steps: refuse what is new, then close when what runs has ended.

Uvicorn's own way closes the port at once, so that clients and load balancers see no 503, and ends the process
by the signal that it got.
"""
import sys
from time import monotonic

import uvicorn
from fastapi import FastAPI

CLOSING = 5                                  # seconds that connections have to close when all is said


class Server(uvicorn.Server):
    """Serves `app` (server.build) until a signal comes and nothing runs, or `limit` seconds after it."""

    def __init__(self, app: FastAPI, limit: float):
        super().__init__(uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_config=None,
                                        log_level="warning", access_log=False,
                                        timeout_graceful_shutdown=CLOSING))
        self.state, self.worker, self.limit = app.state, app.state.worker, limit
        self.deadline, self.said = float("inf"), self.worker.state

    def handle_exit(self, sig: int, frame) -> None:
        """A signal: let running requests end. A second one: do not."""
        self.deadline = 0.0 if self.state.draining else monotonic() + self.limit
        self.state.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it over? Also says how the engine stands, when that changes."""
        if self.worker.state != self.said and self.worker.state != "failed":
            self.said = self.worker.state
            print("nanoinfra:", self.worker.why or "ready", file=sys.stderr, flush=True)
        over = self.state.draining and not self.worker.jobs
        if over or self.worker.failed or monotonic() > self.deadline:
            self.worker.stop()               # who still waits for an answer gets an error now
            self.should_exit = True
        return await super().on_tick(counter)
