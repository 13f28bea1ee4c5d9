"""One rank of the engine in a process of its own: hear commands, take a step, say what is new; again.

Rank 0 talks with the API process, and shares each step's commands with the others, so that every rank runs
the same requests through the same scheduler. While a step runs a thread listens, so the API never waits for
the model; the engine does wait for an API process that is stopped. Started by worker.py, and dies with it.
What goes wrong with one request is said of it; what goes wrong with a step, or on one rank, ends them all.
"""
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field, replace
from math import inf
from multiprocessing.connection import Connection

from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.engine.requests import Event
from nanoinfra.serve.engine.scheduler import QueueFull
from nanoinfra.serve.processes.tp_group import Team
from nanoinfra.train.launch.elastic_rank import end_with_parent

MEANT_FOR_API = (signal.SIGINT, signal.SIGTERM)              # which lets work end; ranks ignore them
BURST = (1024, 1 << 20)                      # requests and tokens that may be on their way, at the least


@dataclass(frozen=True)
class Ready:
    """The engine is loaded: what the API must know of the model."""
    info: dict                               # Engine.info()
    text: Text
    template: str | None = None              # chat template
    room: tuple[float, float] = (inf, inf)   # requests and tokens that may be on their way to it


@dataclass(frozen=True)
class Failed:
    """The engine cannot be loaded, and would not be the next time."""
    why: str


@dataclass(frozen=True)
class Step:
    """What one turn of the loop has brought."""
    stats: dict                              # Engine.stats(); "batch" is empty where nothing was computed
    events: list[Event] = field(default_factory=list)
    refused: list[tuple[str, int, str]] = field(default_factory=list)  # (request, HTTP status, why)
    seconds: float = 0.0
    taken: int = 0                           # commands that the engine has taken from its pipe


def main() -> None:
    """Be the rank that the first message on pipe argv[2] says; further pipes lead to other ranks.

    argv[1] is the process id of the API, which has blocked the signals that are meant for it (life.py).
    """
    parent, *descriptors = map(int, sys.argv[1:])
    end_with_parent(parent)
    for sign in MEANT_FOR_API:
        signal.signal(sign, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_API)
    pipe, *others = map(Connection, descriptors)
    rank, factory = pipe.recv()
    team = Team(rank, others)
    try:
        engine = factory(team)
    except ValueError as error:
        return pipe.send(Failed(str(error)))
    run(engine, team, pipe)


def run(engine, team: Team, pipe: Connection) -> None:
    """Turn until the pipe closes. RuntimeError where ranks disagree on what came to nothing in a turn."""
    inbox, lost = None, []
    if team.rank == 0:
        limits = engine.scheduler
        room = max(BURST[0], limits.seats + limits.queue), max(BURST[1], limits.queue_tokens)
        pipe.send(Ready(engine.info(), engine.text, engine.template, room))
        inbox = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    while True:
        commands, theirs = team.share(inbox and (_take(inbox, wait=not engine.busy), lost))
        if lost != theirs:                                   # before a collective of the next step
            raise RuntimeError(f"rank {team.rank} has ended {lost}, rank 0 {theirs}: they have parted")
        step = turn(engine, commands)
        lost = [(request, status) for request, status, _ in step.refused]
        if inbox:
            pipe.send(replace(step, taken=len(commands)))


def turn(engine, commands: list[tuple]) -> Step:
    """Obey `commands`, then take a step if there is work. A request that fails in it is among the refused."""
    refused = [no for command in commands if (no := _obey(engine, *command))]
    begin, busy = time.monotonic(), engine.busy
    events = engine.step() if busy else []
    refused += [(event.request, 500, event.text) for event in events if event.finish == "error"]
    events = [event for event in events if event.finish != "error"]
    stats = engine.stats()
    return Step(stats if busy else {**stats, "batch": []}, events, refused, time.monotonic() - begin)


def _obey(engine, verb, value=None):
    """("add", Request), ("abort", its id) or ("reset",): why not, if it cannot be added."""
    if verb != "add":
        return engine.reset() if verb == "reset" else engine.abort(value)
    try:
        engine.add(value)
    except ValueError as error:
        return value.id, 400, str(error)
    except QueueFull as error:
        return value.id, 429, str(error)
    except Exception as error:                               # a mistake of the engine's: it has not taken it
        traceback.print_exc()
        return value.id, 500, f"the engine failed on this request: {type(error).__name__}: {error}"


def _listen(pipe, inbox):
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):                              # the API process is no more
        os._exit(0)


def _take(inbox, wait):
    """All commands there are; at least one, if there is nothing else to do."""
    commands = [inbox.get()] if wait else []
    while not inbox.empty():
        commands.append(inbox.get())
    return commands
