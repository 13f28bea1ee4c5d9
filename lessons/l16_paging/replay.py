"""Replay a trace of requests through the real scheduler, step by step, without a model and without torch.

`LoggingScheduler` is the scheduler of serve/engine/scheduler.py with a log. What is drawn and counted comes
from that log, whether `replay_trace` drives it or the engine does (engine_runs.py). One policy is all three:
blocks of a few tokens are paging; blocks as long as the longest sequence, one each, are Orca's contiguous
caches; those filled only when the last batch has ended are static batching.
"""
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.engine.scheduler import Scheduler, SchedulerOutput, Sequence

_UNLIMITED = 1 << 20                            # a budget, or seats, that bind nobody
_PLACEHOLDER_TOKEN = -1  # a token that no model made: after one prompt always the same


@dataclass(frozen=True)
class TraceRequest:
    """A request of a trace: it arrives in step `arrival` with a prompt of `tokens`, and asks for `new`
    tokens."""
    arrival: int
    tokens: tuple[int, ...]
    new: int


@dataclass(frozen=True)
class LoggedStep:
    """What the scheduler did in one step. Requests are named by their index in the trace."""
    at: int
    work: dict[int, tuple[int, int, str]]    # (first token, how many, "prompt", "decode" or "again")
    idle: tuple[int, ...]                    # have a seat and nothing to compute
    waiting: dict[int, str]                  # "waiting", or "preempted" once they were
    preempted: tuple[int, ...]               # in this step
    used: int                                # blocks
    empty: int                               # places in those that hold nothing


class LoggingScheduler(Scheduler):
    """The real scheduler with a log: a LoggedStep for each step, and the slots each request left empty."""

    def __init__(self, blocks: BlockPool, budget: int = _UNLIMITED, seats: int = _UNLIMITED, **limits):
        super().__init__(blocks, budget, seats, **{"max_queued_requests": _UNLIMITED,
                                                   "max_queued_tokens": 1 << 30} | limits)
        self.order: dict[Sequence, int] = {}
        self.log: list[LoggedStep] = []
        self.left: dict[int, int] = {}       # job: places of its blocks that were empty when it ended
        self.now, self.outside = 0, []       # the step; jobs that have come and are not let in

    def add_sequence(self, sequence: Sequence) -> None:
        super().add_sequence(sequence)
        self.order[sequence] = len(self.order)

    def mark_computed(self, plan: SchedulerOutput) -> None:
        super().mark_computed(plan)
        self.note(plan)

    def finish_sequence(self, sequence: Sequence) -> None:
        self.left[self.order[sequence]] = self._empty(sequence)
        super().finish_sequence(sequence)

    def note(self, plan: SchedulerOutput) -> None:
        """Append a step to the log, once its tokens are computed."""
        work = {self.order[each]: (first, count, _kind(each, first, count))
                for each, first, count in plan.scheduled_chunks}
        idle = tuple(self.order[each] for each in self.running if self.order[each] not in work)
        waiting = {self.order[each]: "preempted" if each.num_preemptions else "waiting"
                   for each in self.waiting}
        waiting |= dict.fromkeys(self.outside, "waiting")
        sent_away = tuple(self.order[each] for each in plan.preempted)
        empty = sum(map(self._empty, self.running))
        used = len(self.block_pool.ref_counts) - len(self.block_pool.free_blocks)
        self.log.append(LoggedStep(self.now, work, idle, waiting, sent_away, used, empty))

    @property
    def steps(self) -> int:
        """The number of steps until the last request had ended."""
        return self.log[-1].at + 1

    @property
    def computed(self) -> int:
        """The number of tokens that went through the model."""
        return sum(count for step in self.log for _, count, _ in step.work.values())

    @property
    def counts(self) -> dict[str, int]:
        """The same counters as the engine's metrics, from the log."""
        found = Counter(dict.fromkeys(_COUNTER_NAMES, 0))
        prompts = {i: each.num_prompt_tokens for each, i in self.order.items()}
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
        return len(sequence.block_table) * self.block_pool.block_size - sequence.num_computed_tokens


class RuleScheduler(LoggingScheduler):
    """A scheduler whose step is planned by `rule(running, waiting, blocks, budget)`, a student's function.

    The rule returns [(sequence, first token, how many)], changes both queues and allocates blocks. There is
    no prefix cache.
    """

    def __init__(self, rule: Callable, blocks, budget: int = _UNLIMITED):
        super().__init__(blocks, budget)
        self.rule = rule

    def schedule(self) -> SchedulerOutput:
        before = list(self.running)
        plan = SchedulerOutput(list(self.rule(self.running, self.waiting, self.block_pool,
                                              self.max_num_batched_tokens)))
        plan.preempted = [each for each in before if each in self.waiting]
        for each in plan.preempted:
            each.num_preemptions += 1
        return plan

    def mark_computed(self, plan: SchedulerOutput) -> None:
        for sequence, first, count in plan.scheduled_chunks:
            sequence.num_computed_tokens = first + count
        self.note(plan)


def replay_trace(jobs: Iterable[TraceRequest], scheduler: LoggingScheduler, static: int = 0,
                 until: int = 1 << 30, fresh: bool = False) -> LoggingScheduler:
    """Replay `jobs` until all have ended, or for `until` steps; returns the scheduler with its log.

    `static` is the size of static batches: a sequence that has ended keeps its memory until the last one has.
    With `fresh` no prefix is shared.
    """
    jobs, ended = list(jobs), []

    def add(i):
        scheduler.add_sequence(Sequence(list(jobs[i].tokens), skip_prefix_cache=fresh))

    def step():
        plan = scheduler.schedule()
        if plan.scheduled_chunks:
            scheduler.mark_computed(plan)
        ended.extend(each for each, *_ in plan.scheduled_chunks
                     if _ends(each, jobs[scheduler.order[each]].new))
        ended.extend(plan.out_of_blocks)                                          # the pool is the limit
        if not static or len(ended) == len(scheduler.running):
            for sequence in ended:
                scheduler.finish_sequence(sequence)
            ended.clear()
    step_through_trace(jobs, scheduler, add, step, static, until)
    return scheduler


def _ends(sequence, new):
    """Say a token, if all before it are computed. Is it the last of `new`?"""
    if sequence.num_computed_tokens < len(sequence.tokens):
        return False
    if len(sequence.tokens) - sequence.num_prompt_tokens + 1 == new:
        return True
    sequence.tokens.append(_PLACEHOLDER_TOKEN)
    return False


def replay_three_policies(jobs: Iterable[TraceRequest], places: int, longest: int,
                          size: int) -> dict[str, LoggingScheduler]:
    """Replay `jobs` under static batching, Orca and paging, in KV memory for `places` tokens.

    The first two reserve `longest` tokens for each sequence, paging takes blocks of `size` tokens.
    """
    jobs, seats = list(jobs), places // longest
    return {"static batches": replay_trace(jobs, LoggingScheduler(BlockPool(seats, longest)), static=seats),
            "Orca": replay_trace(jobs, LoggingScheduler(BlockPool(seats, longest))),
            "pages": replay_trace(jobs, LoggingScheduler(BlockPool(places // size, size)))}


def step_through_trace(jobs: list[TraceRequest], scheduler: LoggingScheduler, add: Callable, step: Callable,
                       static: int = 0, until: int = 1 << 30) -> None:
    """Call add(i) for each request i that has arrived, then step(), until all have ended.

    With `static` a batch of that many requests is added only when the batch before has ended.
    """
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


def random_trace(n: int, longest: int, gap: float, seed: int, vocab: int = 256) -> list[TraceRequest]:
    """A random trace of `n` requests, one in `gap` steps on average (0: all at once), the first in step 0.

    Most prompts and answers are short, and each is at most half of `longest`.
    """
    draw, at, jobs = Random(seed), 0.0, []
    for _ in range(n):
        prompt, new = (1 + min(int(draw.expovariate(rate / longest)), longest // 2 - 1) for rate in (8, 5))
        jobs.append(TraceRequest(int(at), tuple(draw.choices(range(vocab), k=prompt)), new))
        at += gap * draw.expovariate(1)
    return jobs


def trace_sizes(jobs: Iterable[TraceRequest]) -> list[tuple[int, int, int]]:
    """[(arrival, prompt tokens, new tokens)] of the requests, as formulas/paged_kv_memory.py takes them."""
    return [(job.arrival, len(job.tokens), job.new) for job in jobs]


def _kind(sequence, first, count):
    if first >= sequence.num_prompt_tokens and count == 1:
        return "decode"
    return "again" if sequence.num_preemptions else "prompt"


_COUNTER_NAMES = ("prompt_tokens", "prefix_queries", "prefix_hits", "preemptions")
