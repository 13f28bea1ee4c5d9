"""The engine as the API sees it: asked in the event loop, it answers from processes of its own.

A keeper thread starts the ranks, hands what they say to the event loop, and starts all of them again when one
has died or hangs; who waited for an answer then gets an error. The keeper lives as long as the ranks do:
Linux takes the end of the thread that started a process for the end of its parent. The event loop never waits
for either: not for an engine that takes nothing, nor for one that does not die.
"""
import asyncio
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from nanoinfra.serve.engine.requests import Request
from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.processes.engine_processes import Dead, Life
from nanoinfra.serve.processes.response_stream import Job
from nanoinfra.serve.processes.tp_group import Team
from nanoinfra.serve.server.errors import Refused

PAUSE = 5.0                                  # seconds before another try, at most: about what loading takes
TICKS = 10                                   # looks at a silent engine, after which it hangs
KILLED = 5.0                                 # seconds in which a killed process is gone


class Worker:
    """The engine that `factory(team)` makes on each of `world` ranks; `watch` (Counters) sees what happens.

    `state`: "loading", "ready", "restarting", "failed", "stopped"; `why` says more. `failed` says why it
    cannot be loaded. The ranks hang when they say nothing for `hung` seconds while there is work; time in
    which this process itself stands still does not count. After a life that served another begins at once;
    where it dies before, each pause is twice the last, up to PAUSE. Its methods belong to the event loop that
    `start` was called in.
    """

    def __init__(self, factory: Callable[[Team], object], watch, world: int = 1, hung: float = 300.0):
        self.factory, self.watch, self.world, self.hung = factory, watch, world, hung
        self.state, self.why, self.ready, self.stats = "loading", "the model is being loaded", None, {}
        self.failed = ""
        self.jobs: dict[str, Job] = {}
        self.untaken: deque[int] = deque()   # tokens of each command that the engine has not taken yet
        self.life, self.newest, self.silent = None, None, 0  # the life that is asked; the keeper's; ticks
        self.ended, self.gone = threading.Event(), asyncio.Event()

    def start(self) -> None:
        """Start the ranks; they load the model while the event loop goes on."""
        self.loop = asyncio.get_running_loop()
        self.keeper = threading.Thread(target=self._keep, name="keeper of the engine", daemon=True)
        self.keeper.start()
        self._tick()

    def stop(self) -> None:
        """End the ranks, which hold nothing that would have to be closed. Who still waits is told.

        `join` waits for their end. A second call does nothing.
        """
        self._lost("stopped", "the server ends")
        self.timer.cancel()
        self.ended.set()
        if self.newest:
            self.newest.kill()

    async def join(self) -> None:
        """Wait, after `stop`, until nothing is left of the ranks; what cannot be killed is left, and said."""
        try:
            await asyncio.wait_for(self.gone.wait(), KILLED)
            self.keeper.join()
        except TimeoutError:
            ranks = self.newest.processes if self.newest else []
            left = ", ".join(str(rank.pid) for rank in ranks if rank.returncode is None)
            print(f"nanoinfra: left behind, for {KILLED:g} s after SIGKILL it is still there: process {left}",
                  file=sys.stderr, flush=True)

    def submit(self, requests: Sequence[Request]) -> Job:
        """Let the engine answer. Raises Refused while there is none."""
        if self.state != "ready":
            raise Refused(503, self.why)
        job = Job(self, requests)
        for request in requests:
            self.jobs[request.id] = job
            self.watch.added(request)
            if self._has_room(len(request.tokens)):
                self._send("add", request, len(request.tokens))
            else:
                self._refuse(request.id, 429, f"the engine takes no requests now: {len(self.untaken)} of "
                             f"{sum(self.untaken)} tokens wait for it; come back later")
        return job

    def abort(self, request: str) -> None:
        """Nobody wants the answer any more."""
        self.watch.dropped(request, "abort")
        self._send("abort", request)

    def reset(self) -> None:
        """Forget cached prefixes. Raises Refused while there is no engine, or one that takes nothing."""
        if self.state != "ready":
            raise Refused(503, self.why)
        if not self._has_room(0):
            raise Refused(429, "the engine takes no requests now; come back later")
        self._send("reset")

    def _send(self, verb, value=None, tokens=0):
        self.untaken.append(tokens)
        self.life.send((verb, value))

    def _has_room(self, tokens):
        """May one more command wait until the engine takes it? Aborts always may: at most one an add."""
        requests, most = self.ready.room
        return not self.untaken or (len(self.untaken) < requests and sum(self.untaken) + tokens <= most)

    def _on(self, life, news):
        """In the event loop: a rank has spoken."""
        if self.state == "stopped":
            return
        self.silent = 0
        if isinstance(news, Ready):
            self.life, self.ready, self.state, self.why = life, news, "ready", ""
            return self.watch.started(news.info)
        for _ in range(news.taken):
            self.untaken.popleft()
        self.stats = news.stats
        self.watch.stepped(news)
        for request, status, why in news.refused:
            if request in self.jobs:
                self._refuse(request, status, why)
        for event in news.events:
            if event.request in self.jobs:
                self.jobs[event.request].put(event)

    def _refuse(self, request, status, why):
        self.watch.dropped(request)
        self.jobs[request].fail(request, Refused(status, why))

    def _lost(self, state, why):
        """In the event loop: there is no engine now."""
        if self.state == "stopped":
            return                           # by us
        self.failed = why if state == "failed" else self.failed
        self.state, self.why, self.stats = state, why, {}
        self.untaken.clear()
        for request in list(self.jobs):
            self._refuse(request, 503, why)

    def _tick(self):
        """In the event loop, TICKS times in `hung` seconds: does an engine with work still speak?"""
        self.silent = self.silent + 1 if self.jobs or self.untaken else 0
        if self.silent > TICKS:
            self.life.kill(f"the engine has said nothing for {self.hung:g} s")
        self.timer = self.loop.call_later(self.hung / TICKS, self._tick)

    def _keep(self):
        """The keeper's work."""
        try:
            self._live()
        except Exception as bug:
            self._post(self._lost, "failed", f"the engine cannot be kept running: {bug!r}")
            raise
        finally:
            self._post(self.gone.set)

    def _live(self):
        """One life of the ranks after the other."""
        pause, loaded = 0.0, False
        while not self.ended.wait(pause):
            self.newest = life = Life(self.factory, self.world)
            if self.ended.is_set():
                life.kill()                  # `stop` may not have seen it
            why = self._hear(life)
            life.end()
            loaded |= life.ready
            self._post(self._lost, "restarting" if loaded else "failed", why)
            if not loaded:
                return                       # the next would end as this one has
            pause = 0.0 if life.served else min(PAUSE, 2 * pause + 0.1)

    def _hear(self, life):
        """Pass on what the ranks say until they are no more; why that is."""
        try:
            while True:
                for each in life.hear():
                    self._post(self._on, life, each)
        except Dead as dead:
            return str(dead)

    def _post(self, call, *args):
        with suppress(RuntimeError):                         # the event loop is closed already
            self.loop.call_soon_threadsafe(call, *args)
