"""Known-wrong turns of the engine's loop: one request ends the rank, a failure is an answer, ranks part.

`drive` calls the loop with an engine and a team that follow a script.
"""
import contextlib
import io

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.engine.request_and_output import Request, RequestOutput
from nanoinfra.serve.processes import engine_loop

turns, NAMES = Check("turns"), ("odd", "bad", "good")


def drive(what, *given):
    return getattr(engine_loop, what)(*given)


class _Scripted:
    """An engine that fails with "bad" and takes no "odd"."""

    def __init__(self):
        self.has_unfinished_requests, self.stats = False, dict

    def add_request(self, request):
        if request.request_id == "odd":
            raise ArithmeticError("nobody has thought of this")
        self.has_unfinished_requests = True

    def step(self):
        return [RequestOutput("bad", 0, "why", finish_reason="error"), RequestOutput("good", 0, "a")]


class _Parted:
    rank, turns = 1, 0

    def broadcast_object(self, value=None):
        self.turns += 1
        if self.turns > 3:
            raise EOFError
        return [("add", Request("good", [1]))], [("x", 500)]


@turns.criterion("who fails is refused, and nobody else", "property")
def _(subject):
    try:
        with contextlib.redirect_stderr(io.StringIO()):                  # the loop shows what it has caught
            step = subject("execute_commands_and_step", _Scripted(),
                           [("add", Request(name, [1])) for name in NAMES])
    except ArithmeticError as error:
        raise CriterionNotMet(f"the rank dies of one request: {error}") from error
    if [(name, status) for name, status, _ in step.refused_requests] != [("odd", 500), ("bad", 500)]:
        raise CriterionNotMet(f"{step.refused_requests} are refused")
    if [event.request_id for event in step.outputs] != ["good"]:
        raise CriterionNotMet(f"events of {[event.request_id for event in step.outputs]}, want good's alone")


@turns.criterion("ranks that disagree do not go on", "property")
def _(subject):
    try:
        subject("run_busy_loop", _Scripted(), _Parted(), None)
    except RuntimeError:
        return
    except EOFError:
        raise CriterionNotMet("rank 0 has lost a request that rank 1 has not, and both go on") from None


def obeys_or_dies(engine, verb, value=None):
    try:
        {"add": lambda: engine.add_request(value), "abort": lambda: engine.abort_request(value),
         "reset": lambda: engine.reset_prefix_cache()}[verb]()
    except ValueError as error:
        return value.request_id, 400, str(error)


def answers_all(engine, commands):
    refused = [no for command in commands if (no := engine_loop._execute(engine, *command))]
    return engine_loop.EngineStepResult(engine.stats(), engine.step(), refused)


def runs_on(engine, team, pipe):
    while True:
        engine_loop.execute_commands_and_step(engine, team.broadcast_object()[0])


REFUSED, PARTED = (c.name for c in turns.criteria)
LOOP = "nanoinfra.serve.processes.engine_loop"
MUTANTS = [
    Mutant("a rank dies of what it is asked", turns,
           patched(drive, f"{LOOP}:_execute", obeys_or_dies), REFUSED),
    Mutant("who fails is answered", turns,
           patched(drive, f"{LOOP}:execute_commands_and_step", answers_all), REFUSED),
    Mutant("ranks that disagree go on", turns, patched(drive, f"{LOOP}:run_busy_loop", runs_on), PARTED),
]
