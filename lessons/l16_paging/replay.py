"""A trace of requests through the real scheduler, step by step, without a model and without torch.

`Watched` is serve/engine/scheduler.py's own, with a log. What is drawn and counted comes from that log,
whether `replay` drives it or the engine does (engine_runs.py). One policy is all three: blocks of a few
tokens are paging; blocks as long as the longest sequence, one each, are Orca's contiguous caches; those
filled only when the last batch has ended are static batching.
"""
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from nanoinfra.serve.engine.block_pool import Blocks
from nanoinfra.serve.engine.scheduler import Plan, Scheduler, Sequence

ENDLESS = 1 << 20                            # a budget, or seats, that bind nobody
SAID = -1                                    # a token that no model made: after one prompt always the same


@dataclass(frozen=True)
class Job:
    """A request of a trace: it comes in step `arrival` with `tokens` and wants `new` more."""
    arrival: int
    tokens: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class Step:
    """What happened in one step; jobs by their place in the trace."""
    at: int
    work: dict[int, tuple[int, int, str]]    # (first token, how many, "prompt", "decode" or "again")
    idle: tuple[int, ...]                    # have a seat and nothing to compute
    waiting: dict[int, str]                  # "waiting", or "preempted" once they were
    preempted: tuple[int, ...]               # in this step
    used: int                                # blocks
    empty: int                               # places in those that hold nothing


class Watched(Scheduler):
    """The real scheduler, with a log: a Step each, and of every job what its last block left empty."""

    def __init__(self, blocks: Blocks, budget: int = ENDLESS, seats: int = ENDLESS, **limits):
        super().__init__(blocks, budget, seats, **{"queue": ENDLESS, "queue_tokens": 1 << 30} | limits)
        self.order: dict[Sequence, int] = {}
        self.log: list[Step] = []
        self.left: dict[int, int] = {}       # job: places of its blocks that were empty when it ended
        self.now, self.outside = 0, []       # the step; jobs that have come and are not let in

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self.order[sequence] = len(self.order)

    def done(self, plan: Plan) -> None:
        super().done(plan)
        self.note(plan)

    def finish(self, sequence: Sequence) -> None:
        self.left[self.order[sequence]] = self._empty(sequence)
        super().finish(sequence)

    def note(self, plan: Plan) -> None:
        """Write the step into the log, once its tokens are computed."""
        work = {self.order[each]: (first, count, _kind(each, first, count))
                for each, first, count in plan.work}
        idle = tuple(self.order[each] for each in self.running if self.order[each] not in work)
        waiting = {self.order[each]: "preempted" if each.preempted else "waiting" for each in self.waiting}
        waiting |= dict.fromkeys(self.outside, "waiting")
        sent_away = tuple(self.order[each] for each in plan.preempted)
        empty = sum(map(self._empty, self.running))
        used = len(self.blocks.holders) - len(self.blocks.free)
        self.log.append(Step(self.now, work, idle, waiting, sent_away, used, empty))

    @property
    def steps(self) -> int:
        """Until the last job had ended."""
        return self.log[-1].at + 1

    @property
    def computed(self) -> int:
        """Tokens that went through the model."""
        return sum(count for step in self.log for _, count, _ in step.work.values())

    @property
    def counts(self) -> dict[str, int]:
        """What the engine counts, from the log."""
        found, prompts = Counter(dict.fromkeys(COUNTS, 0)), {i: each.prompt for each, i in self.order.items()}
        begun, made = set(), Counter()
        for step in self.log:
            found["preemptions"] += len(step.preempted)
            for i, (first, count, _) in step.work.items():
                found["prompt_tokens"] += max(0, min(first + count, prompts[i]) - first)
                if i not in begun:
                    found["prefix_queries"] += prompts[i]
                    found["prefix_hits"] += first
                begun.add(i)
                made[i] = max(made[i], first + count + 1 - prompts[i])   # caught up: one more is known
        return {**found, "generation_tokens": sum(made.values()), "steps": len(self.log)}

    def _empty(self, sequence):
        return len(sequence.table) * self.blocks.size - sequence.computed


class Ruled(Watched):
    """A scheduler whose step is `rule(running, waiting, blocks, budget)`, [(sequence, first, how many)].

    The rule changes both queues and takes blocks. No contents are remembered.
    """

    def __init__(self, rule: Callable, blocks, budget: int = ENDLESS):
        super().__init__(blocks, budget)
        self.rule = rule

    def plan(self) -> Plan:
        before = list(self.running)
        plan = Plan(list(self.rule(self.running, self.waiting, self.blocks, self.budget)))
        plan.preempted = [each for each in before if each in self.waiting]
        for each in plan.preempted:
            each.preempted += 1
        return plan

    def done(self, plan: Plan) -> None:
        for sequence, first, count in plan.work:
            sequence.computed = first + count
        self.note(plan)


def replay(jobs: Iterable[Job], scheduler: Watched, static: int = 0, until: int = 1 << 30,
           fresh: bool = False) -> Watched:
    """Run `jobs` until all have ended, or for `until` steps. `static`: seats of a batch, left all at once.

    Who has ended in a static batch keeps seat and memory until the last has. `fresh`: no prompt is shared.
    """
    jobs, ended = list(jobs), []

    def add(i):
        scheduler.add(Sequence(list(jobs[i].tokens), fresh=fresh))

    def step():
        plan = scheduler.plan()
        if plan.work:
            scheduler.done(plan)
        ended.extend(each for each, *_ in plan.work if _ends(each, jobs[scheduler.order[each]].new))
        ended.extend(plan.full)                                          # the pool is the limit
        if not static or len(ended) == len(scheduler.running):
            for sequence in ended:
                scheduler.finish(sequence)
            ended.clear()
    drive(jobs, scheduler, add, step, static, until)
    return scheduler


def _ends(sequence, new):
    """Say a token, if all before it are computed. Is it the last of `new`?"""
    if sequence.computed < len(sequence.tokens):
        return False
    if len(sequence.tokens) - sequence.prompt + 1 == new:
        return True
    sequence.tokens.append(SAID)
    return False


def policies(jobs: Iterable[Job], places: int, longest: int, size: int) -> dict[str, Watched]:
    """`jobs` under all three in KV memory for `places` tokens: stretches of `longest`, blocks of `size`."""
    jobs, seats = list(jobs), places // longest
    return {"static batches": replay(jobs, Watched(Blocks(seats, longest)), static=seats),
            "Orca": replay(jobs, Watched(Blocks(seats, longest))),
            "pages": replay(jobs, Watched(Blocks(places // size, size)))}


def drive(jobs: list[Job], scheduler: Watched, add: Callable, step: Callable, static: int = 0,
          until: int = 1 << 30) -> None:
    """The clock: before each step() add(i) every job i that has come, or of a static batch those it seats."""
    coming, here = deque(enumerate(jobs)), True
    while (coming or here) and scheduler.now < until:
        busy = scheduler.running or scheduler.waiting
        room = (0 if busy else static) if static else len(jobs)
        while coming and room and coming[0][1].arrival <= scheduler.now:
            add(coming.popleft()[0])
            room -= 1
        scheduler.outside = [i for i, job in coming if job.arrival <= scheduler.now]
        step()
        scheduler.now += 1
        here = scheduler.running or scheduler.waiting


def draw_trace(n: int, longest: int, gap: float, seed: int, vocab: int = 256) -> list[Job]:
    """`n` jobs, one in `gap` steps on average (0: all at once), the first in step 0.

    Prompt and answer are short for the most part, and each at most half of `longest`.
    """
    draw, at, jobs = Random(seed), 0.0, []
    for _ in range(n):
        prompt, new = (1 + min(int(draw.expovariate(rate / longest)), longest // 2 - 1) for rate in (8, 5))
        jobs.append(Job(int(at), tuple(draw.choices(range(vocab), k=prompt)), new))
        at += gap * draw.expovariate(1)
    return jobs


def numbers(jobs: Iterable[Job]) -> list[tuple[int, int, int]]:
    """(arrival, prompt tokens, new tokens) of each: what formulas/paged_kv.py takes."""
    return [(job.arrival, len(job.tokens), job.new) for job in jobs]


def _kind(sequence, first, count):
    if first >= sequence.prompt and count == 1:
        return "decode"
    return "again" if sequence.preempted else "prompt"


COUNTS = ("prompt_tokens", "prefix_queries", "prefix_hits", "preemptions")
