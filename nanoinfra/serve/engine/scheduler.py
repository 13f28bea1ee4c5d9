"""Continuous batching by one rule: a sequence has tokens, of which some are computed; let those catch up.

Each step hands out a budget of tokens, to running sequences first, then to waiting ones. A prompt in chunks,
a prompt that begins as another did, decoding (one token to catch up) and going on after a preemption are
that rule, and no phases. Where blocks run out, the last that came gives all of its back and waits; its tokens
are computed again later. No torch. Orca: Yu et al. 2022; vLLM: Kwon et al. 2023.
"""
from collections import deque
from dataclasses import dataclass, field

from nanoinfra.serve.engine.block_pool import Blocks, chain, root


class QueueFull(Exception):
    """Too much waits already; come back later."""


@dataclass(eq=False)
class Sequence:
    """Tokens, of which the first `computed` have keys and values in the blocks of `table`."""
    tokens: list[int]                        # the prompt's and all that were made
    n: int = 1                               # will fork into so many, when its prompt is computed
    root: bytes = field(default_factory=root)  # whose keys and values it may share: blocks.root
    fresh: bool = False                      # computes all of its prompt, whatever is known
    computed: int = 0
    table: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # the root, then of each full block
    prompt: int = 0                          # how many tokens it came with
    hit: int = 0                             # tokens whose blocks were known when it last began
    preempted: int = 0                       # times

    def __post_init__(self):
        self.prompt = len(self.tokens)
        self.keys.append(self.root)


@dataclass
class Plan:
    """One step's work: (sequence, first token, how many) each, blocks to copy before, who cannot go on."""
    work: list[tuple[Sequence, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)          # (from, to)
    full: list[Sequence] = field(default_factory=list)                   # alone, and the pool is too small
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Who computes how many tokens in the next step. `budget` tokens a step, `seats` sequences at once.

    At most `queue` sequences, and `queue_tokens` tokens of theirs, may wait.
    """

    def __init__(self, blocks: Blocks, budget: int = 512, seats: int = 64, queue: int = 1024,
                 queue_tokens: int = 1 << 20):
        if budget < 1 or seats < 1:
            raise ValueError(f"a step of {budget} tokens and {seats} sequences does nothing; give at least 1")
        self.blocks, self.budget, self.seats = blocks, budget, seats
        self.queue, self.queue_tokens = queue, queue_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        """Let it wait. QueueFull where too much waits; ValueError where it could never run."""
        room = len(self.blocks.holders) * self.blocks.size
        if not sequence.tokens:
            raise ValueError("a sequence without tokens cannot go on; give it at least one")
        if len(sequence.tokens) >= room:
            raise ValueError(f"a prompt of {len(sequence.tokens)} tokens and one more do not fit the KV "
                             f"memory, which holds {room}; shorten it, or give the server more memory")
        if not 1 <= sequence.n <= self.seats:
            raise ValueError(f"n = {sequence.n} sequences at once; give 1 to {self.seats}")
        waits = sum(len(each.tokens) for each in self.waiting)
        if len(self.waiting) >= self.queue or waits + len(sequence.tokens) > self.queue_tokens:
            raise QueueFull(f"{len(self.waiting)} requests of {waits} tokens wait; at most {self.queue} of "
                            f"{self.queue_tokens} may")
        self.waiting.append(sequence)

    def plan(self) -> Plan:
        """The next step. Blocks for all of its tokens are taken."""
        plan, left = Plan(), self.budget
        for sequence in list(self.running):
            count = min(left, len(sequence.tokens) - sequence.computed)
            if count and sequence in self.running and self._make_room(sequence, count, plan):
                plan.work.append((sequence, sequence.computed, count))
                left -= count
        while left and self.waiting and not plan.preempted and (work := self._admit(left, plan)):
            plan.work.append(work)
            left -= work[2]
        return plan

    def done(self, plan: Plan) -> None:
        """The step's tokens are computed: full blocks are known from now on."""
        for sequence, first, count in plan.work:
            sequence.computed = first + count
            for i in range(first // self.blocks.size, sequence.computed // self.blocks.size):
                chain(sequence.keys, sequence.tokens, self.blocks.size)
                self.blocks.learn(sequence.table[i], sequence.keys[i + 1])

    def fork(self, sequence: Sequence) -> Sequence:
        """One more that goes on from where `sequence` is: they share all blocks, until one writes."""
        twin = Sequence(list(sequence.tokens), root=sequence.root, computed=sequence.computed,
                        table=list(sequence.table), keys=sequence.keys[1:], hit=sequence.hit)
        twin.keys.insert(0, twin.keys.pop())         # __post_init__ has put the root last
        twin.prompt, sequence.n = sequence.prompt, 1
        for block in twin.table:
            self.blocks.share(block)
        self.running.insert(self.running.index(sequence) + 1, twin)
        return twin

    def preempt(self, sequence: Sequence) -> None:
        """It runs, gives its blocks back and is the next to begin again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted += 1
        self.waiting.appendleft(sequence)

    def finish(self, sequence: Sequence) -> None:
        """It needs nothing any more, wherever it is."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _make_room(self, sequence, count, plan):
        """Blocks of its own for the next `count` tokens; the last that came give theirs, if need be."""
        while not self._grow(sequence, count, plan):
            if self.running == [sequence]:
                plan.full.append(sequence)
                return False
            victim = self.running[-1]
            self.preempt(victim)
            plan.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence, count, plan):
        """Take what is missing, all or nothing. A block that others hold too is copied before a write."""
        size, table, blocks = self.blocks.size, sequence.table, self.blocks
        shared = [i for i in range(sequence.computed // size, len(table)) if blocks.holders[table[i]] > 1]
        missing = -(-(sequence.computed + count) // size) - len(table)
        if len(shared) + max(0, missing) > len(blocks.free):
            return False
        for i in shared:
            own = blocks.take()
            plan.copies.append((table[i], own))
            blocks.give_back([table[i]])
            table[i] = own
        table.extend(blocks.take() for _ in range(missing))
        return True

    def _admit(self, left, plan):
        """(the first that waits, its first token, how many), or None where there is no room for it."""
        sequence = self.waiting[0]
        if sum(each.n for each in self.running) + sequence.n > self.seats:
            return None
        chain(sequence.keys, sequence.tokens, self.blocks.size)
        known = [] if sequence.fresh else self.blocks.find(self._usable(sequence))
        for block in known:
            self.blocks.share(block)
        sequence.table, sequence.computed = list(known), self.blocks.size * len(known)
        count = min(left, len(sequence.tokens) - sequence.computed)
        if not self._grow(sequence, count, plan):
            self._release(sequence)
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.hit = sequence.computed
        return sequence, sequence.computed, count

    def _usable(self, sequence):
        """The keys of blocks that need not be computed. One token always is: it has the logits."""
        return sequence.keys[1:1 + (len(sequence.tokens) - 1) // self.blocks.size]

    def _release(self, sequence):
        self.blocks.give_back(sequence.table)
        sequence.table, sequence.computed = [], 0
