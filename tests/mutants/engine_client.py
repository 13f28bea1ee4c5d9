"""Known-wrong keepers of the engine: memory without end, hangs that are none, pauses that grow.

`books` is a Worker without processes, whose engine is a list.
"""
import asyncio
import contextlib
import functools
from unittest import mock

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.processes import engine_client, engine_processes
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests.serve.fake import fake, text

BOUND = 8                                    # commands that may wait
waiting = Check("waiting for the engine")


class Paper:
    """A life on paper: it writes down what it is told."""

    def __init__(self, factory=None, world=1, served=True):
        self.sent, self.killed, self.loaded, self.has_stepped = [], 0, True, served

    def send_command(self, command):
        self.sent.append(command)

    def kill_all(self, why=""):
        self.killed += 1

    def receive_messages(self):
        raise engine_processes.ProcessDied("it died")

    def kill_and_wait(self):
        pass


def books(act):
    """What `act` finds in a Worker that is ready, in its event loop."""
    async def run():
        one = engine_client.EngineClient(fake, ServerMetrics("fake"), hang_timeout=3600.0)
        one.loop = asyncio.get_running_loop()
        one._on_message(Paper(), EngineReady({"blocks": 1, "block_size": 1}, text(), None, (BOUND, 1 << 20)))
        one._tick()
        try:
            return act(one)
        finally:
            one.timer.cancel()
    return asyncio.run(run())


@waiting.criterion("what waits for an engine that takes nothing is bounded", "property")
def _(subject):
    def hammer(one):
        for i in range(10 * BOUND):
            one.submit_requests([Request(f"r{i}", [1])]).close()
        with contextlib.suppress(APIError):
            one.reset_prefix_cache()
        return len(one.processes.sent)
    if (got := subject(hammer)) > 2 * BOUND:
        raise CriterionNotMet(f"{got} commands wait, want {BOUND}, and an abort of each")


@waiting.criterion("an engine hangs that is silent and has work", "property")
def _(subject):
    def still(one, work):
        for _ in range(3 * engine_client._SILENT_TICKS_UNTIL_HUNG):
            one._tick()
        idle = one.processes.killed
        setattr(one, work, {"a": 0})
        for _ in range(engine_client._SILENT_TICKS_UNTIL_HUNG + 1):
            one._tick()
        setattr(one, work, {})
        return idle, one.processes.killed
    for work in ("streams", "untaken_tokens"):
        if (got := subject(functools.partial(still, work=work))) != (0, 1):
            raise CriterionNotMet(f"{work}: ended {got} times, idle and with work; want (0, 1)")


@waiting.criterion("an end that was asked for is no failure", "property")
def _(subject):
    def stop(one):
        one.stop()
        one._on_engine_lost("failed", "rank 0 was killed by SIGKILL")
        return one.state, one.load_error
    if (got := subject(stop)) != ("stopped", ""):
        raise CriterionNotMet(f"it is {got[0]}, failed by {got[1]!r}; want stopped, by nothing")


@waiting.criterion("a pause grows where no life serves, up to a load's time", "property")
def _(subject):
    for served, want in ((True, [0.0] * 12), (False, [0, .1, .3, .7, 1.5, 3.1] + [5.0] * 6)):
        def keep(one, served=served):
            pauses = []
            one.stop_requested.wait = lambda pause: pauses.append(round(pause, 2)) or len(pauses) == 12
            with mock.patch.object(engine_client, "EngineProcesses", functools.partial(Paper, served=served)):
                one._keep_running()
            return pauses
        if (got := subject(keep)) != want:
            raise CriterionNotMet(f"lives that served {served}: pauses {got}, want {want}")


class AlwaysHasRoom(engine_client.EngineClient):
    def _has_room(self, tokens):
        return True


class CountsIdleTime(engine_client.EngineClient):
    def _tick(self):
        silent = self.silent_ticks
        super()._tick()
        self.silent_ticks = silent + 1


class SeesOpenAnswersAlone(engine_client.EngineClient):   # whoever gives up takes the evidence along
    def _tick(self):
        super()._tick()
        self.silent_ticks *= bool(self.streams)


class TakesItsOwnKillForADeath(engine_client.EngineClient):
    def _on_engine_lost(self, state, why):
        self.load_error = why if state == "failed" else self.load_error
        super()._on_engine_lost(state, why)


BOUNDED, HANGS, ASKED, PAUSES = (criterion.name for criterion in waiting.criteria)
WORKER = "nanoinfra.serve.processes.engine_client:EngineClient"
MUTANTS = [
    Mutant("whatever comes waits", waiting, patched(books, WORKER, AlwaysHasRoom), BOUNDED),
    Mutant("an idle engine hangs", waiting, patched(books, WORKER, CountsIdleTime), HANGS),
    Mutant("an engine that only loses its clients", waiting,
           patched(books, WORKER, SeesOpenAnswersAlone), HANGS),
    Mutant("a rank that the server has ended is a failure", waiting,
           patched(books, WORKER, TakesItsOwnKillForADeath), ASKED),
    Mutant("pauses of up to 30 s", waiting, patched(
        books, "nanoinfra.serve.processes.engine_client:_MAX_RESTART_DELAY_SECONDS", 30.0), PAUSES),
]
