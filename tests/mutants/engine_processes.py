"""Known-wrong lives of the engine's ranks: ended by what is meant for others, left behind, waited for.

`ranks` starts real processes, with the fake engine.
"""
import asyncio
import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.engine.request_and_output import Request
from nanoinfra.serve.processes import engine_client, engine_processes
from nanoinfra.serve.server.prometheus_metrics import ServerMetrics
from tests.processes import alive, children
from tests.serve.fake import compiling, fake
from tests.serve.host import ROOT

PATIENCE = 30.0                              # seconds for what takes less than one
LONG = functools.partial(fake, context=1 << 18, blocks=1 << 15)          # takes long prompts
leaving = Check("the engine's ranks")


def ranks(act):
    """What `act` finds with real ranks. Whatever it leaves behind is ended."""
    begun, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        begun.append(popen(*args, **kwargs))
        return begun[-1]
    with mock.patch.object(subprocess, "Popen", start):
        try:
            return act()
        finally:
            for process in begun:
                process.kill()
                process.wait()


def until(true, seconds=PATIENCE):
    """Did it come true in time?"""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


@leaving.criterion("a signal to all is the API's", "property")
def _(subject):
    def interrupt():
        one = engine_processes.EngineProcesses(fake, 1)
        try:
            one.processes[0].send_signal(signal.SIGTERM)     # it has just begun
            return type(one.receive_messages()[0]).__name__
        except engine_processes.ProcessDied as dead:
            return str(dead)
        finally:
            one.kill_and_wait()
    if (got := subject(interrupt)) != "EngineReady":
        raise CriterionNotMet(f"a rank that gets SIGTERM while it starts: {got}")


@leaving.criterion("a rank ends whose parent has died before it could ask", "property")
def _(subject):
    def orphan():
        code = ("import functools, os, signal\n"
                "from nanoinfra.serve.processes import engine_processes as life\n"
                "from tests.serve.fake import fake\n"
                f"life._RANK_PROGRAM = {engine_processes._RANK_PROGRAM!r}\n"
                "one = life.EngineProcesses(functools.partial(fake, load=600), 1)\n"
                "print(one.processes[0].pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
            pid = int(parent.stdout.readline())              # its end would be the orphan's
        if left := not until(lambda: not alive(pid), 5.0):
            os.kill(pid, signal.SIGKILL)
        return left
    if subject(orphan):
        raise CriterionNotMet("it goes on without a parent: did it compare who started it with whom it has?")


@leaving.criterion("what a rank has started ends with it", "property")
def _(subject):
    def compile():
        one = engine_processes.EngineProcesses(compiling, 1)
        until(lambda: children(one.processes[0].pid))
        [program] = children(one.processes[0].pid)
        one.kill_and_wait()
        if left := not until(lambda: not alive(program), 2.0):
            os.kill(program, signal.SIGKILL)
        return left
    if subject(compile):
        raise CriterionNotMet("a compiler goes on when its rank has ended; want both gone")


def started(then):
    """Run `then(worker)` in the event loop of a Worker that is ready, in a thread; what it said in time."""
    facts, kept = {}, []

    async def run():
        kept.append(one := engine_client.EngineClient(LONG, ServerMetrics("fake")))
        one.start()
        while one.state == "loading":
            await asyncio.sleep(0.01)
        facts["pid"] = one.processes.processes[0].pid
        then(one, facts)
        one.stop()
        facts["stopped"] = True
        await one.join()
    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    if not until(lambda: "pid" in facts):
        raise CriterionNotMet("no engine")
    facts["in time"] = until(lambda: "stopped" in facts, 3.0)
    facts["left"] = not until(lambda: not alive(facts["pid"]), 3.0)
    with contextlib.redirect_stderr(io.StringIO()):
        for process in kept[0].newest_processes.processes:             # a mutant may wait for its end
            process.kill()
        thread.join(PATIENCE)
    return facts


@leaving.criterion("nobody waits for a stopped engine", "property")
def _(subject):
    def ask(one, facts):
        os.kill(facts["pid"], signal.SIGSTOP)
        for i in range(9):
            one.submit_requests([Request(f"r{i}", [7] * 100_000)])
    if not subject(functools.partial(started, ask))["in time"]:
        raise CriterionNotMet("900,000 tokens for an engine that is stopped: whoever asks waits for the pipe")


@leaving.criterion("an end leaves nothing, and is not waited for in the event loop", "property")
def _(subject):
    def nothing(one, facts):
        end = engine_processes.EngineProcesses.kill_and_wait
        slow.enter_context(mock.patch.object(engine_processes.EngineProcesses, "kill_and_wait",
                                             lambda one: (time.sleep(4), end(one))))
    with contextlib.ExitStack() as slow:
        facts = subject(functools.partial(started, nothing))
    if facts["left"]:
        raise CriterionNotMet("the rank is there 3 s after the end")
    if not facts["in time"]:
        raise CriterionNotMet("the event loop waits until a process is no more")


class WaitsForTheKeeper(engine_client.EngineClient):
    def stop(self):
        super().stop()
        self.keeper.join()


class SendsItself(engine_processes.EngineProcesses):
    def send_command(self, command):
        with contextlib.suppress(OSError):
            self.pipes[0].send(command)


class KillsRanksAlone(engine_processes.EngineProcesses):
    def kill_all(self, why=""):
        for process in self.processes:
            process.kill()


class KillsNobody(engine_processes.EngineProcesses):
    def kill_all(self, why=""):
        pass


ASKS_NOBODY = ("from nanoinfra.serve.processes import engine_loop as loop; ask = loop.die_with_parent\n"
               "loop.die_with_parent = lambda parent: ask()\nloop.main()")
YOUNG, ORPHAN, CHILD, STOPPED, NOTHING = (criterion.name for criterion in leaving.criteria)
WORKER = "nanoinfra.serve.processes.engine_client:EngineClient"
LIFE = "nanoinfra.serve.processes.engine_client:EngineProcesses"
MUTANTS = [
    Mutant("Ctrl-C ends a young rank", leaving,
           patched(ranks, "nanoinfra.serve.processes.engine_processes:block_signals",
                   lambda signals: contextlib.nullcontext()), YOUNG),
    Mutant("a rank asks too late who its parent is", leaving,
           patched(ranks, "nanoinfra.serve.processes.engine_processes:_RANK_PROGRAM", ASKS_NOBODY), ORPHAN),
    Mutant("a compiler goes on", leaving,
           patched(ranks, "nanoinfra.serve.processes.engine_processes:EngineProcesses", KillsRanksAlone),
           CHILD),
    Mutant("the event loop writes to the pipe", leaving, patched(ranks, LIFE, SendsItself), STOPPED),
    Mutant("ranks are not killed", leaving, patched(ranks, LIFE, KillsNobody), NOTHING),
    Mutant("the event loop waits for the end of ranks", leaving,
           patched(ranks, WORKER, WaitsForTheKeeper), NOTHING),
]
