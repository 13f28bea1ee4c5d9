"""Simulate a schedule on a virtual clock, with given times and no process started; and check its messages.

A resource is whatever does one task at a time: a stage's processor, the link between two stages. A task waits
for its resource and for the tasks that it depends on. Pipelines are simulated so, and the overlap of data
parallelism: each bucket is a task of the link, after the backward that fills it.
"""
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from nanoinfra.parallel.pipeline.schedules import (
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    OptimizerStep,
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    mark_last_backwards,
    message_peer,
    required_recv_and_send,
)

SecondsPerChunk = float | Sequence[float]    # for every chunk alike, or one for each of the p v chunks
_SENDS, _RECVS = (SendActivation, SendGrad), (RecvActivation, RecvGrad)
_BACKWARDS = (Backward, BackwardInput, BackwardWeight)


class SimulatedTask(NamedTuple):
    """A task that takes `seconds` of `resource`, once the tasks named in `depends_on` have ended."""
    resource: Hashable
    seconds: float
    depends_on: tuple = ()


def simulate_tasks(tasks: dict[Hashable, SimulatedTask]) -> dict[Hashable, tuple[float, float]]:
    """{name: (begin, end)} in s: each resource does its tasks in the order given, each as soon as it can.

    Raises ValueError where some tasks can never begin (a deadlock), naming one of them and what it waits for.
    """
    queues, free_at, done = defaultdict(list), defaultdict(float), {}
    for name, task in tasks.items():
        queues[task.resource].append(name)
    position = dict.fromkeys(queues, 0)
    while len(done) < len(tasks):
        before = len(done)
        for resource, names in queues.items():
            while position[resource] < len(names) and all(
                    name in done for name in tasks[names[position[resource]]].depends_on):
                task = tasks[name := names[position[resource]]]
                begin = max([free_at[resource], *(done[one][1] for one in task.depends_on)])
                done[name] = begin, begin + task.seconds
                free_at[resource] = begin + task.seconds
                position[resource] += 1
        if len(done) == before:
            raise ValueError("nobody can go on: " + _describe_deadlock(tasks, queues, position, done))
    return done


@dataclass(frozen=True)
class StepTimeline:
    """When each stage computes in a step: a list for each stage of (instruction, begin, end) in s."""
    compute_spans: list[list[tuple[object, float, float]]]

    @property
    def step_seconds(self) -> float:
        """Seconds from the first computation to the end of the last."""
        return max(end for stage in self.compute_spans for _, _, end in stage)

    @property
    def idle_seconds(self) -> list[float]:
        """For every stage the seconds of the step in which it computes nothing: its pipeline bubble."""
        return [self.step_seconds - sum(end - begin for _, begin, end in stage)
                for stage in self.compute_spans]

    @property
    def peak_in_flight(self) -> list[int]:
        """For every stage the most (micro-batch, chunk) pairs whose activations it holds at a time."""
        return [max_micro_batches_in_flight([instruction for instruction, _, _ in stage])
                for stage in self.compute_spans]


def simulate_schedule(stage_schedules: list[list], forward_seconds: SecondsPerChunk,
                      backward_input_seconds: SecondsPerChunk, backward_weight_seconds: SecondsPerChunk,
                      send_seconds: float = 0.0) -> StepTimeline:
    """Simulate a schedule, one list a stage. A `Backward` takes the time of both halves.

    Times in s, one number or one for each chunk of the model, in its order. Messages from a stage to one
    other stage follow one another.
    """
    times = {Forward: (forward_seconds,), BackwardInput: (backward_input_seconds,),
             BackwardWeight: (backward_weight_seconds,),
             Backward: (backward_input_seconds, backward_weight_seconds)}
    p, v = len(stage_schedules), chunks_per_stage(stage_schedules)
    tasks = {}
    for r, order in enumerate(stage_schedules):
        for what in order:
            if type(what) in times:
                recv = required_recv_and_send(what, r, p, v)[0]
                seconds = sum(_of_chunk(t, what.chunk * p + r) for t in times[type(what)])
                tasks[r, what] = SimulatedTask(r, seconds, (message_peer(recv, r, p),) if recv else ())
            elif isinstance(what, _SENDS):
                link = r, message_peer(what, r, p)[0]
                tasks[r, what] = SimulatedTask(link, send_seconds, (_computation_of(what, r, order),))
    spans = simulate_tasks(tasks)
    return StepTimeline([[(what, *spans[r, what]) for what in order if type(what) in times]
                         for r, order in enumerate(stage_schedules)])


def chunks_per_stage(stage_schedules: list[list]) -> int:
    """v: how many chunks of the model a stage has in this schedule."""
    return 1 + max(what.chunk for order in stage_schedules for what in order if isinstance(what, Forward))


def max_micro_batches_in_flight(order: Iterable) -> int:
    """The most (micro-batch, chunk) pairs whose activations one stage holds at a time, running `order`."""
    now = most = 0
    for what in order:
        now += isinstance(what, Forward) - isinstance(what, (Backward, BackwardWeight))
        most = max(most, now)
    return most


def validate_schedule(stage_schedules: list[list]) -> None:
    """Raise ValueError unless the lists are a schedule that every stage can carry out.

    Each micro-batch goes forward and back once through each chunk; a receive is started before what it brings
    is needed, and what is computed is sent; sends and receives match, in one order between any two stages;
    nothing deadlocks even where a send blocks until its receive has started.
    """
    p, v = len(stage_schedules), chunks_per_stage(stage_schedules)
    pairs = {(what.micro_batch, chunk) for order in stage_schedules for what in order
             if isinstance(what, Forward) for chunk in range(v)}
    for r, order in enumerate(stage_schedules):
        _check_computations(order, r, pairs)
        _check_messages(order, r, p, v)
    for r, other in ((r, other) for r in range(p) for other in range(p)):
        sends = _messages_between(stage_schedules[r], _SENDS, r, other, p)
        sent = [message_peer(what, r, p)[1] for what in sends]
        started = _messages_between(stage_schedules[other], _RECVS, other, r, p)
        for pair in zip_longest(sent, started):
            if pair[0] != pair[1]:
                raise ValueError(f"stage {r} sends stage {other} something for {pair[0]}, where {pair[1]} is "
                                 "ready")
    simulate_tasks({(r, what): SimulatedTask(r, 0.0, _comes_first(what, r, p, v))
                    for r, order in enumerate(stage_schedules) for what in order})


def _messages_between(order, kinds, r, other, p):
    return [what for what in order if isinstance(what, kinds) and message_peer(what, r, p)[0] == other]


def _comes_first(what, r, p, v):
    """What another stage must do first: of a blocking send its receive, of a computation the send."""
    needs = what if isinstance(what, _SENDS) else required_recv_and_send(what, r, p, v)[0]
    return (message_peer(needs, r, p),) if needs else ()


def _check_computations(order, r, wanted):
    """Each (micro-batch, chunk) forward once, then backward once, whole or in two halves; then the step."""
    for what in order:
        if order.count(what) > 1:
            raise ValueError(f"stage {r} does {what} twice")
    for micro_batch, chunk in wanted:
        did = [type(what).__name__ for what in order if isinstance(what, (Forward, *_BACKWARDS))
               and (what.micro_batch, what.chunk) == (micro_batch, chunk)]
        if did not in (["Forward", "Backward"], ["Forward", "BackwardInput", "BackwardWeight"]):
            raise ValueError(f"stage {r} takes micro-batch {micro_batch} through chunk {chunk} as {did}")
    if [*map(type, order[-2:])] != [ReduceGrads, OptimizerStep]:
        raise ValueError(f"stage {r} ends with {order[-2:]}, not with ReduceGrads and OptimizerStep")
    marked = [what for what in order if isinstance(what, (Backward, BackwardWeight)) and what.is_last]
    if marked != [what for what in mark_last_backwards(order) if what in marked] or len(marked) != len(
            {chunk for _, chunk in wanted}):
        raise ValueError(f"stage {r} calls {marked} last: of each chunk it must be the last to its weights")


def _check_messages(order, r, p, v):
    """Receives come before what needs them; results for other stages are sent after they are made."""
    seen, sent, made = set(), set(), set()
    for what in order:
        recv, send = required_recv_and_send(what, r, p, v)
        if recv and recv not in seen:
            raise ValueError(f"stage {r} comes to {what} and has no {recv} before it")
        seen.add(what)
        sent |= {what} if isinstance(what, _SENDS) else set()
        made |= {send} if send else set()
        if not sent <= made:
            raise ValueError(f"stage {r} sends {sent - made}, which it has not made")
    if made != sent:
        raise ValueError(f"stage {r} makes {made - sent}, which never leave")


def _computation_of(send, r, order):
    """The computation whose result `send` sends."""
    kinds = (Forward,) if isinstance(send, SendActivation) else (Backward, BackwardInput)
    return r, next(what for what in order if isinstance(what, kinds)
                   and (what.micro_batch, what.chunk) == (send.micro_batch, send.chunk))


def _of_chunk(seconds, chunk):
    return seconds if isinstance(seconds, (int, float)) else seconds[chunk]


def _describe_deadlock(tasks, queues, position, done):
    name = next(names[position[resource]] for resource, names in queues.items()
                if position[resource] < len(names))
    return f"{name} waits for {[one for one in tasks[name].depends_on if one not in done] or 'its turn'}"
