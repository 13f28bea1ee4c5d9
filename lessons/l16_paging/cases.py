"""Test cases of lesson 16: calls to a block pool, and states of the real scheduler."""
import copy
import functools
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from lessons.l16_paging.replay import LoggingScheduler, RuleScheduler, random_trace, replay_trace
from nanoinfra.lab.check import CriterionNotMet
from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.engine.scheduler import Sequence

LONGEST = 32
MOST_LINES = 100_000                         # a right plan of at most 12 sequences runs a few hundred
POOLS = [(40, 4, 9), (40, 4, 200), (14, 4, 9), (14, 3, 200), (24, 1, 5), (9, 4, 6)]     # blocks, size, budget


@dataclass
class Moment:
    """Before a step: both queues, the blocks, the budget; and what the real scheduler did then."""
    running: list[Sequence]
    waiting: deque[Sequence]
    blocks: BlockPool
    budget: int
    want: list[tuple[int, int, int]]         # (who, first token, how many)
    sent_away: list[int]
    names: dict[Sequence, int]               # who: by order of arrival

    def fresh(self) -> "Moment":
        """A copy to plan in: it shares nothing."""
        return copy.deepcopy(self)

    def name(self, sequence) -> str:
        """As the texts call it."""
        return f"sequence {self.names[sequence]}" if sequence in self.names else f"{sequence!r}"[:40]

    def __str__(self):
        runs = ", ".join(f"{self.names[s]} ({s.num_computed_tokens} of {len(s.tokens)})"
                         for s in self.running)
        waits = ", ".join(f"{self.names[s]} ({len(s.tokens)})" for s in self.waiting)
        return (f"budget {self.budget}, {len(self.blocks.free_blocks)} blocks of {self.blocks.block_size} "
                f"free; runs (computed of tokens): {runs or 'nobody'}; waits (tokens): {waits or 'nobody'}")


class _Kept(LoggingScheduler):
    """Keeps the moment before each step. What was computed is not looked for again."""

    def __init__(self, blocks, budget):
        super().__init__(blocks, budget)
        self.moments = []

    def schedule(self):
        now = Moment(self.running, self.waiting, self.block_pool, self.max_num_batched_tokens, [], [],
                     self.order)
        moment = copy.deepcopy(now)
        plan = super().schedule()
        moment.want = [(self.order[each], first, count) for each, first, count in plan.scheduled_chunks]
        moment.sent_away = [self.order[each] for each in plan.preempted]
        self.moments.append(moment)
        return plan


@functools.cache
def moments() -> list[Moment]:
    """All that the checks look at, from traces in large and in small pools; the short ones first."""
    found = []
    for seed, (n, size, budget) in enumerate(POOLS):
        kept = _Kept(BlockPool(n, size), budget)
        replay_trace(random_trace(12, LONGEST, 1.0, seed), kept, fresh=True)
        found += kept.moments
    return sorted((moment for moment in found if moment.running or moment.waiting),
                  key=lambda moment: len(moment.running) + len(moment.waiting))


@functools.lru_cache(maxsize=4)
def planned(subject) -> list[tuple[Moment, Moment, list]]:
    """(before, after, its work) of `subject` at every moment."""
    return [(moment, after, _work(subject, moment, after))
            for moment in moments() for after in [moment.fresh()]]


def _work(subject, before, after):
    try:
        work = ending(subject)(after.running, after.waiting, after.blocks, after.budget)
    except IndexError as error:
        why = ": where too few are, one that runs sends the last away, and one that waits waits"
        raise CriterionNotMet(f"{before}: IndexError: {error}{why * ('no block' in str(error))}") from error
    except Endless as endless:
        raise CriterionNotMet(f"{before}: {endless}") from endless
    if work is None:
        raise TypeError("the plan is None, want a list of (sequence, first token, how many): no return?")
    return work


class Endless(Exception):
    """A plan of more than MOST_LINES lines."""


def ending(subject):
    """`subject`, whose plan is a list; Endless where it has none."""
    def ended(*args):
        lines, old = 0, sys.gettrace()

        def count(frame, event, _):
            nonlocal lines
            lines += event == "line"
            if lines > MOST_LINES:
                raise Endless("plan does not end: is who is sent away taken out of `running`?")
            return count
        sys.settrace(count)
        try:
            work = subject(*args)
            return None if work is None else list(work)                  # a generator runs here
        finally:
            sys.settrace(old)
    return ended


def whole(subject, n: int, size: int, budget: int, seed: int) -> tuple[LoggingScheduler, LoggingScheduler]:
    """A trace planned by `subject`, and by the real scheduler. RuntimeError where it does not end."""
    jobs = random_trace(12, LONGEST, 1.0, seed)
    want = replay_trace(jobs, LoggingScheduler(BlockPool(n, size), budget), fresh=True)
    return replay_trace(jobs, RuleScheduler(ending(subject), BlockPool(n, size), budget),
                        until=2 * want.steps), want


def calls(seed: int, most: int = 60) -> Iterator[tuple[str, int]]:
    """A random order of what is asked of a pool, each with a number that says of which."""
    draw, all_of_them = Random(seed), ("take", "take", "share", "give back", "give back", "write")
    for _ in range(most):
        yield draw.choice(all_of_them), draw.randrange(1 << 20)


class Ledger:
    """What a pool should be: tables of sequences, and of each block how many of them hold it."""

    def __init__(self, n: int):
        self.tables: list[list[int]] = []
        self.n = n

    @property
    def holders(self) -> list[int]:
        """Of each block."""
        held = [block for table in self.tables for block in table]
        return [held.count(block) for block in range(self.n)]

    @property
    def full(self) -> bool:
        """Is no block free?"""
        return 0 not in self.holders
