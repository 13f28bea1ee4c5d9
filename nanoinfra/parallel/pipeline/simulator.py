"""The virtual clock: replays who does what when, with given times and no process started.

A lane is whatever can do one thing at a time: a stage's processor, the wire between two. A task waits for its
lane and for the tasks it comes after. Pipelines are replayed so, and the overlap of data parallelism: each
bucket is a task of the wire, after the backward that fills it. `validate` checks a schedule's messages.
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
    RecvActivation,
    RecvGrad,
    ReduceGrads,
    SendActivation,
    SendGrad,
    Step,
    mark_last,
    messages,
    neighbour,
)

Seconds = float | Sequence[float]            # for every chunk alike, or one for each of the p v
SENDS, RECEIVES = (SendActivation, SendGrad), (RecvActivation, RecvGrad)
BACKWARDS = (Backward, BackwardInput, BackwardWeight)


class Task(NamedTuple):
    """`seconds` on `lane`, once the tasks named in `after` have ended."""
    lane: Hashable
    seconds: float
    after: tuple = ()


def replay(tasks: dict[Hashable, Task]) -> dict[Hashable, tuple[float, float]]:
    """{name: (begin, end)}: each lane does its tasks in the order given, each as soon as it can.

    Raises ValueError where some can never begin, naming one of them and what it waits for.
    """
    lanes, free, done = defaultdict(list), defaultdict(float), {}
    for name, task in tasks.items():
        lanes[task.lane].append(name)
    at = dict.fromkeys(lanes, 0)
    while len(done) < len(tasks):
        before = len(done)
        for lane, names in lanes.items():
            while at[lane] < len(names) and all(name in done for name in tasks[names[at[lane]]].after):
                task = tasks[name := names[at[lane]]]
                begin = max([free[lane], *(done[one][1] for one in task.after)])
                done[name] = begin, begin + task.seconds
                free[lane], at[lane] = begin + task.seconds, at[lane] + 1
        if len(done) == before:
            raise ValueError("nobody can go on: " + _stuck(tasks, lanes, at, done))
    return done


@dataclass(frozen=True)
class Timeline:
    """What the clock saw: for every stage (instruction, begin, end) in s, computations alone."""
    spans: list[list[tuple[object, float, float]]]

    @property
    def step(self) -> float:
        """Seconds from the first computation to the end of the last."""
        return max(end for stage in self.spans for _, _, end in stage)

    @property
    def idle(self) -> list[float]:
        """For every stage the seconds of the step in which it computes nothing."""
        return [self.step - sum(end - begin for _, begin, end in stage) for stage in self.spans]

    @property
    def peak(self) -> list[int]:
        """For every stage the most micro-batches, by chunk, that have begun and still keep activations."""
        return [in_flight([what for what, _, _ in stage]) for stage in self.spans]


def simulate(lists: list[list], t_forward: Seconds, t_backward_input: Seconds, t_backward_weight: Seconds,
             t_send: float = 0.0) -> Timeline:
    """Replay a schedule, one list a stage. `Backward` takes both halves' time.

    Times in s, one number or one for each chunk of the model, in its order. A message takes `t_send`; those
    of a stage to one other follow one another.
    """
    times = {Forward: (t_forward,), BackwardInput: (t_backward_input,), BackwardWeight: (t_backward_weight,),
             Backward: (t_backward_input, t_backward_weight)}
    p, v = len(lists), chunks(lists)
    tasks = {}
    for r, order in enumerate(lists):
        for what in order:
            if type(what) in times:
                came = messages(what, r, p, v)[0]
                seconds = sum(_of(t, what.chunk * p + r) for t in times[type(what)])
                tasks[r, what] = Task(r, seconds, (neighbour(came, r, p),) if came else ())
            elif isinstance(what, SENDS):
                tasks[r, what] = Task((r, neighbour(what, r, p)[0]), t_send, (_maker(what, r, order),))
    spans = replay(tasks)
    return Timeline([[(what, *spans[r, what]) for what in order if type(what) in times]
                     for r, order in enumerate(lists)])


def chunks(lists: list[list]) -> int:
    """v: chunks a stage of this schedule."""
    return 1 + max(what.chunk for order in lists for what in order if isinstance(what, Forward))


def in_flight(order: Iterable) -> int:
    """The most (micro-batch, chunk) pairs of which `order` keeps activations at a time."""
    now = most = 0
    for what in order:
        now += isinstance(what, Forward) - isinstance(what, (Backward, BackwardWeight))
        most = max(most, now)
    return most


def validate(lists: list[list]) -> None:
    """Raise ValueError unless the lists are a schedule that every stage can carry out.

    Each micro-batch goes forward and back once through each chunk; what a stage needs has a place ready and
    what it makes leaves; each message has both ends, in one order on each way; nobody is left waiting even
    where a send blocks until the other end is ready.
    """
    p, v = len(lists), chunks(lists)
    pairs = {(what.micro, chunk) for order in lists for what in order if isinstance(what, Forward)
             for chunk in range(v)}
    for r, order in enumerate(lists):
        _check_work(order, r, pairs)
        _check_messages(order, r, p, v)
    for r, other in ((r, other) for r in range(p) for other in range(p)):
        sent = [neighbour(what, r, p)[1] for what in _on_the_way(lists[r], SENDS, r, other, p)]
        ready = _on_the_way(lists[other], RECEIVES, other, r, p)
        for pair in zip_longest(sent, ready):
            if pair[0] != pair[1]:
                raise ValueError(f"stage {r} sends stage {other} something for {pair[0]}, where {pair[1]} is "
                                 "ready")
    replay({(r, what): Task(r, 0.0, _before(what, r, p, v)) for r, order in enumerate(lists)
            for what in order})


def _on_the_way(order, kinds, r, other, p):
    return [what for what in order if isinstance(what, kinds) and neighbour(what, r, p)[0] == other]


def _before(what, r, p, v):
    """What elsewhere comes first: of a blocking send its receive, of a computation the send."""
    needs = what if isinstance(what, SENDS) else messages(what, r, p, v)[0]
    return (neighbour(needs, r, p),) if needs else ()


def _check_work(order, r, wanted):
    """Each pair (micro-batch, chunk) forward once, then back once, whole or in two halves; then the step."""
    for what in order:
        if order.count(what) > 1:
            raise ValueError(f"stage {r} does {what} twice")
    for micro, chunk in wanted:
        did = [type(what).__name__ for what in order if isinstance(what, (Forward, *BACKWARDS))
               and (what.micro, what.chunk) == (micro, chunk)]
        if did not in (["Forward", "Backward"], ["Forward", "BackwardInput", "BackwardWeight"]):
            raise ValueError(f"stage {r} takes micro-batch {micro} through chunk {chunk} as {did}")
    if [*map(type, order[-2:])] != [ReduceGrads, Step]:
        raise ValueError(f"stage {r} ends with {order[-2:]}, not with ReduceGrads and Step")
    marked = [what for what in order if isinstance(what, (Backward, BackwardWeight)) and what.last]
    if marked != [what for what in mark_last(order) if what in marked] or len(marked) != len(
            {chunk for _, chunk in wanted}):
        raise ValueError(f"stage {r} calls {marked} last: of each chunk it must be the last to its weights")


def _check_messages(order, r, p, v):
    there, made, owed = set(), set(), set()
    for what in order:
        needs, makes = messages(what, r, p, v)
        if needs and needs not in there:
            raise ValueError(f"stage {r} comes to {what} and has no {needs} before it")
        there.add(what)
        made |= {what} if isinstance(what, SENDS) else set()
        owed |= {makes} if makes else set()
        if not made <= owed:
            raise ValueError(f"stage {r} sends {made - owed}, which it has not made")
    if owed != made:
        raise ValueError(f"stage {r} makes {owed - made}, which never leave")


def _maker(send, r, order):
    """The computation that makes what `send` sends."""
    kinds = (Forward,) if isinstance(send, SendActivation) else (Backward, BackwardInput)
    return r, next(what for what in order if isinstance(what, kinds)
                   and (what.micro, what.chunk) == (send.micro, send.chunk))


def _of(seconds, chunk):
    return seconds if isinstance(seconds, (int, float)) else seconds[chunk]


def _stuck(tasks, lanes, at, done):
    name = next(names[at[lane]] for lane, names in lanes.items() if at[lane] < len(names))
    return f"{name} waits for {[one for one in tasks[name].after if one not in done] or 'its turn'}"
