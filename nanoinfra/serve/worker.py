"""The engine as the API sees it: asked in the event loop, it answers from processes of its own.

A keeper thread starts the ranks, hands what they say to the event loop, and starts all of them again when one
has died or hangs; who waited for an answer then gets an error. The keeper lives as long as the ranks do:
Linux takes the end of the thread that started a process for the end of its parent.
"""
import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic

from nanoinfra.serve.errors import Refused
from nanoinfra.serve.life import Dead, Life
from nanoinfra.serve.loop import Ready
from nanoinfra.serve.requests import Event, Request
from nanoinfra.serve.team import Team

LONG = 60.0                                  # seconds of a life after which another is started at once


class Job:
    """Requests under way: iterate over their events, and close it in the end."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]):
        self.worker, self.news = worker, asyncio.Queue()
        self.open = {request.id: request.n for request in requests}       # continuations still to come

    def __aiter__(self):
        return self

    async def __anext__(self) -> Event:
        """Raises Refused where there is no answer."""
        if not self.open and self.news.empty():
            raise StopAsyncIteration
        news = await self.news.get()
        if isinstance(news, Refused):
            raise news
        return news

    def put(self, event: Event) -> None:
        """Called by the worker, with news."""
        self.news.put_nowait(event)
        if event.finish:
            self.open[event.request] -= 1
            if not self.open[event.request]:
                self._drop(event.request)

    def fail(self, request: str, why: Refused) -> None:
        """Called by the worker: nothing more comes."""
        self.news.put_nowait(why)
        self._drop(request)

    def close(self) -> None:
        """Give up what has not ended."""
        for request in list(self.open):
            self.worker.abort(request)
            self._drop(request)

    def _drop(self, request):
        del self.open[request], self.worker.jobs[request]


class Worker:
    """The engine that `factory(team)` makes on each of `world` ranks; `watch` (Counters) sees what happens.

    `state`: "loading", "ready", "restarting", "failed", "stopped"; `why` says more. `failed` says why it
    cannot be loaded. The ranks hang when they say nothing for `hung` seconds while there is work.
    Its methods belong to the event loop that `start` was called in.
    """

    def __init__(self, factory: Callable[[Team], object], watch, world: int = 1, hung: float = 300.0):
        self.factory, self.watch, self.world, self.hung = factory, watch, world, hung
        self.state, self.why, self.ready, self.stats = "loading", "the model is being loaded", None, {}
        self.failed = ""
        self.jobs: dict[str, Job] = {}
        self.life, self.ended, self.lock = None, threading.Event(), threading.Lock()

    def start(self) -> None:
        """Start the ranks; they load the model while the event loop goes on."""
        self.loop = asyncio.get_running_loop()
        self.keeper = threading.Thread(target=self._keep, name="keeper of the engine")
        self.keeper.start()

    def stop(self) -> None:
        """End the ranks, which hold nothing that would have to be closed. Who still waits is told.

        A second call does nothing.
        """
        self._lost("stopped", "the server ends")
        with self.lock:
            self.ended.set()
            if self.life:
                self.life.kill()
        self.keeper.join()

    def submit(self, requests: Sequence[Request]) -> Job:
        """Let the engine answer. Raises Refused while there is none."""
        if self.state != "ready":
            raise Refused(503, self.why)
        job = Job(self, requests)
        for request in requests:
            self.jobs[request.id] = job
            self.watch.added(request)
            self.life.send(("add", request))
        return job

    def abort(self, request: str) -> None:
        """Nobody wants the answer any more."""
        self.watch.dropped(request, "abort")
        self.life.send(("abort", request))

    def reset(self) -> None:
        """Forget cached prefixes. Raises Refused while there is no engine."""
        if self.state != "ready":
            raise Refused(503, self.why)
        self.life.send(("reset",))

    def _on(self, news):
        """In the event loop: a rank has spoken."""
        if self.state == "stopped":
            return
        if isinstance(news, Ready):
            self.ready, self.state, self.why = news, "ready", ""
            return self.watch.started(news.info)
        self.stats = news.stats
        self.watch.stepped(news)
        for request, status, why in news.refused:
            if request in self.jobs:
                self.watch.dropped(request)
                self.jobs[request].fail(request, Refused(status, why))
        for event in news.events:
            if event.request in self.jobs:
                self.jobs[event.request].put(event)

    def _lost(self, state, why):
        """In the event loop: there is no engine now."""
        self.failed = why if state == "failed" else self.failed
        if self.state != "stopped":
            self.state, self.why, self.stats = state, why, {}
        for request, job in list(self.jobs.items()):
            self.watch.dropped(request)
            job.fail(request, Refused(503, why))

    def _keep(self):
        """The keeper's work: one life of the ranks after the other."""
        pause, loaded = 0.0, False
        while not self.ended.wait(pause):
            with self.lock:
                if self.ended.is_set():
                    return
                began, self.life = monotonic(), Life(self.factory, self.world)
            why = self._hear(self.life)
            self.life.end()
            loaded |= self.life.ready
            self._post(self._lost, "restarting" if loaded else "failed", why)
            if not loaded:
                return                       # the next would end as this one has
            pause = 0.0 if monotonic() - began > LONG else min(30.0, 2 * pause + 0.1)

    def _hear(self, life):
        """Pass on what the ranks say until they are no more; why that is."""
        try:
            while True:
                news = life.hear(self.hung)
                if not news and self.jobs:
                    return f"the engine has said nothing for {self.hung:g} s"
                for each in news:
                    self._post(self._on, each)
        except Dead as dead:
            return str(dead)

    def _post(self, call, *args):
        with suppress(RuntimeError):                         # the event loop is closed already
            self.loop.call_soon_threadsafe(call, *args)
