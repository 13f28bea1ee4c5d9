"""One rank of the engine in a process of its own: take commands, compute a step, send the outputs, and again.

Rank 0 talks with the API process and broadcasts each turn's commands to the other ranks, so that all run the
same requests through the same scheduler. A thread receives while a step runs, so the API never waits for the
model; the engine does wait for an API process that is stopped. EngineProcesses starts the rank, which ends
with it. An error with one request is reported for that request; an error of a step, or of one rank, ends all.
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

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.engine.request_and_output import RequestOutput
from nanoinfra.serve.engine.scheduler import QueueFull
from nanoinfra.serve.processes.tensor_parallel_group import TensorParallelGroup
from nanoinfra.train.launch.elastic_rank import die_with_parent

API_SIGNALS = (signal.SIGINT,
               signal.SIGTERM)    # for the API process, which lets requests end; ranks ignore them
MIN_IN_FLIGHT = (1024, 1 << 20)                  # requests and tokens that may be on their way to any engine


@dataclass(frozen=True)
class EngineReady:
    """The message that the engine is loaded, with what the API must know of the model."""
    info: dict                               # Engine.static_info()
    tokenizer: Tokenizer
    chat_template: str | None = None
    max_in_flight: tuple[float, float] = (inf, inf)      # requests and tokens that may be on their way to it


@dataclass(frozen=True)
class EngineLoadFailed:
    """The message that the engine cannot be loaded, and could not be the next time."""
    reason: str


@dataclass(frozen=True)
class EngineStepResult:
    """The message with the results of one turn of the loop: commands taken, and at most one step."""
    stats: dict                              # Engine.stats(); "batch" is empty where nothing was computed
    outputs: list[RequestOutput] = field(default_factory=list)
    refused_requests: list[tuple[str, int,
                                 str]] = field(default_factory=list)   # (request id, HTTP status, why)
    step_seconds: float = 0.0
    num_commands_taken: int = 0


def main() -> None:
    """Run the rank that the first message on pipe argv[2] names; further pipes lead to other ranks.

    argv[1] is the process id of the API process, which has blocked the signals that are meant for it.
    """
    parent, *descriptors = map(int, sys.argv[1:])
    die_with_parent(parent)
    for sign in API_SIGNALS:
        signal.signal(sign, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, API_SIGNALS)
    pipe, *others = map(Connection, descriptors)
    rank, engine_factory = pipe.recv()
    tp_group = TensorParallelGroup(rank, others)
    try:
        engine = engine_factory(tp_group)
    except ValueError as error:
        return pipe.send(EngineLoadFailed(str(error)))
    run_busy_loop(engine, tp_group, pipe)


def run_busy_loop(engine, tp_group: TensorParallelGroup, pipe: Connection) -> None:
    """Take commands and compute steps until the pipe closes.

    Raises RuntimeError where ranks disagree on the requests that failed in a turn.
    """
    inbox, failed = None, []
    if tp_group.rank == 0:
        limits = engine.scheduler
        max_in_flight = (max(MIN_IN_FLIGHT[0], limits.max_num_seqs + limits.max_queued_requests),
                         max(MIN_IN_FLIGHT[1], limits.max_queued_tokens))
        pipe.send(EngineReady(engine.static_info(), engine.tokenizer, engine.chat_template, max_in_flight))
        inbox = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    while True:
        wait = not engine.has_unfinished_requests
        mine = inbox and (_take_commands(inbox, wait), failed)
        commands, failed_on_rank_0 = tp_group.broadcast_object(mine)
        if failed != failed_on_rank_0:                       # before a collective of the next step
            raise RuntimeError(f"rank {tp_group.rank} has ended {failed}, rank 0 {failed_on_rank_0}: "
                               "they have parted")
        result = execute_commands_and_step(engine, commands)
        failed = [(request_id, status) for request_id, status, _ in result.refused_requests]
        if inbox:
            pipe.send(replace(result, num_commands_taken=len(commands)))


def execute_commands_and_step(engine, commands: list[tuple]) -> EngineStepResult:
    """Execute `commands`, then a step if there is work. Requests that fail in it are among the refused."""
    refused = [refusal for command in commands if (refusal := _execute(engine, *command))]
    begin, busy = time.monotonic(), engine.has_unfinished_requests
    outputs = engine.step() if busy else []
    refused += [(each.request_id, 500, each.text) for each in outputs if each.finish_reason == "error"]
    outputs = [each for each in outputs if each.finish_reason != "error"]
    stats = engine.stats()
    return EngineStepResult(stats if busy else {**stats, "batch": []}, outputs, refused,
                            time.monotonic() - begin)


def _execute(engine, verb, value=None):
    """("add", Request), ("abort", its id) or ("reset",): the refusal, if a request cannot be added."""
    if verb != "add":
        return engine.reset_prefix_cache() if verb == "reset" else engine.abort_request(value)
    try:
        engine.add_request(value)
    except ValueError as error:
        return value.request_id, 400, str(error)
    except QueueFull as error:
        return value.request_id, 429, str(error)
    except Exception as error:                               # a mistake of the engine's: it has not taken it
        traceback.print_exc()
        return value.request_id, 500, f"the engine failed on this request: {type(error).__name__}: {error}"


def _listen(pipe, inbox):
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):                              # the API process is no more
        os._exit(0)


def _take_commands(inbox, wait):
    """All commands that have come; with `wait`, at least one."""
    commands = [inbox.get()] if wait else []
    while not inbox.empty():
        commands.append(inbox.get())
    return commands
