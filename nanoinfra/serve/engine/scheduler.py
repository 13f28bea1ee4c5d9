"""The scheduler: continuous batching, chunked prefill, prefix caching and preemption by one rule.

A sequence has tokens, of which the first `num_computed_tokens` have keys and values; each step lets sequences
catch up. A step computes at most `max_num_batched_tokens`, of running sequences first, then of waiting ones.
A prompt in chunks, a cached prefix, decoding (one token to catch up) and going on after a preemption are that
same rule; there are no separate phases. Where blocks run out, the sequence that came last is preempted: it
frees its blocks, waits, and its tokens are computed again. No torch. Orca: Yu et al. 2022; vLLM: Kwon et al.
2023.
"""
from collections import deque
from dataclasses import dataclass, field

from nanoinfra.serve.engine.block_pool import BlockPool, extend_block_hashes, root_block_hash


class QueueFull(Exception):
    """Too many requests or tokens wait already; the client should come back later."""


@dataclass(eq=False)
class Sequence:
    """Tokens, of which the first `num_computed_tokens` have keys and values in blocks of `block_table`."""
    tokens: list[int]                        # of the prompt, then those that were generated
    n: int = 1                               # is forked into so many sequences when its prompt is computed
    root_hash: bytes = field(default_factory=root_block_hash)  # only with the same root are blocks shared
    skip_prefix_cache: bool = False          # computes all of its prompt, whatever is cached
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # root_hash, then the hash of each full block
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0               # found in the prefix cache when the sequence last began to run
    num_preemptions: int = 0

    def __post_init__(self):
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)
        self.block_hashes = self.block_hashes or [self.root_hash]


@dataclass
class SchedulerOutput:
    """What one step computes, and what happens to blocks and sequences before it."""
    scheduled_chunks: list[tuple[Sequence, int, int]] = field(default_factory=list)  # first token, how many
    blocks_to_copy: list[tuple[int, int]] = field(default_factory=list)  # (from, to), before the step
    out_of_blocks: list[Sequence] = field(default_factory=list)          # alone, and the pool is too small
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Decides which sequences compute how many tokens in the next step.

    A step has at most `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences. At most
    `max_queued_requests` sequences, of `max_queued_tokens` tokens together, may wait.
    """

    def __init__(self, block_pool: BlockPool, max_num_batched_tokens: int = 512, max_num_seqs: int = 64,
                 max_queued_requests: int = 1024, max_queued_tokens: int = 1 << 20):
        if max_num_batched_tokens < 1 or max_num_seqs < 1:
            raise ValueError(f"a step of {max_num_batched_tokens} tokens and {max_num_seqs} sequences does "
                             "nothing; give at least 1")
        self.block_pool = block_pool
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.max_queued_requests, self.max_queued_tokens = max_queued_requests, max_queued_tokens
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    def add_sequence(self, sequence: Sequence) -> None:
        """Append to `waiting`. Raises QueueFull where too much waits, ValueError where it could never run."""
        room = len(self.block_pool.ref_counts) * self.block_pool.block_size
        if not sequence.tokens:
            raise ValueError("a sequence without tokens cannot go on; give it at least one")
        if len(sequence.tokens) >= room:
            raise ValueError(f"a prompt of {len(sequence.tokens)} tokens and one more do not fit the KV "
                             f"memory, which holds {room}; shorten it, or give the server more memory")
        if not 1 <= sequence.n <= self.max_num_seqs:
            raise ValueError(f"n = {sequence.n} sequences at once; give 1 to {self.max_num_seqs}")
        queued = sum(len(each.tokens) for each in self.waiting)
        if (len(self.waiting) >= self.max_queued_requests
                or queued + len(sequence.tokens) > self.max_queued_tokens):
            raise QueueFull(f"{len(self.waiting)} requests of {queued} tokens wait; at most "
                            f"{self.max_queued_requests} of {self.max_queued_tokens} may")
        self.waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """Plan the next step, and allocate the blocks for all of its tokens."""
        output, budget = SchedulerOutput(), self.max_num_batched_tokens
        for sequence in list(self.running):
            count = min(budget, len(sequence.tokens) - sequence.num_computed_tokens)
            if count and sequence in self.running and self._make_room(sequence, count, output):
                output.scheduled_chunks.append((sequence, sequence.num_computed_tokens, count))
                budget -= count
        while budget and self.waiting and not output.preempted and (chunk := self._admit(budget, output)):
            output.scheduled_chunks.append(chunk)
            budget -= chunk[2]
        return output

    def mark_computed(self, output: SchedulerOutput) -> None:
        """Count the step's tokens as computed, and put the blocks that it filled into the prefix cache."""
        size = self.block_pool.block_size
        for sequence, first, count in output.scheduled_chunks:
            sequence.num_computed_tokens = first + count
            for i in range(first // size, sequence.num_computed_tokens // size):
                extend_block_hashes(sequence.block_hashes, sequence.tokens, size)
                self.block_pool.cache_full_block(sequence.block_table[i], sequence.block_hashes[i + 1])

    def fork_sequence(self, sequence: Sequence) -> Sequence:
        """Add a running copy of `sequence`. The two share all blocks until one writes: copy on write."""
        fork = Sequence(list(sequence.tokens), root_hash=sequence.root_hash,
                        num_computed_tokens=sequence.num_computed_tokens,
                        block_table=list(sequence.block_table), block_hashes=list(sequence.block_hashes),
                        num_prompt_tokens=sequence.num_prompt_tokens,
                        num_cached_tokens=sequence.num_cached_tokens)
        sequence.n = 1
        for block in fork.block_table:
            self.block_pool.incref(block)
        self.running.insert(self.running.index(sequence) + 1, fork)
        return fork

    def preempt(self, sequence: Sequence) -> None:
        """Stop a running sequence: it frees its blocks and becomes the first that waits."""
        self.running.remove(sequence)
        self._free_blocks(sequence)
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def finish_sequence(self, sequence: Sequence) -> None:
        """Remove a running or waiting sequence and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._free_blocks(sequence)

    def _make_room(self, sequence, count, output):
        """Allocate for the next `count` tokens; preempt the sequences that came last where blocks run out."""
        while not self._allocate_blocks(sequence, count, output):
            if self.running == [sequence]:
                output.out_of_blocks.append(sequence)
                return False
            victim = self.running[-1]
            self.preempt(victim)
            output.preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _allocate_blocks(self, sequence, count, output):
        """Allocate what is missing, all or nothing. A block with other holders is copied before the write."""
        pool, size = self.block_pool, self.block_pool.block_size
        table, computed = sequence.block_table, sequence.num_computed_tokens
        shared = [i for i in range(computed // size, len(table)) if pool.ref_counts[table[i]] > 1]
        missing = -(-(computed + count) // size) - len(table)
        if len(shared) + max(0, missing) > len(pool.free_blocks):
            return False
        for i in shared:
            own = pool.allocate()
            output.blocks_to_copy.append((table[i], own))
            pool.free([table[i]])
            table[i] = own
        table.extend(pool.allocate() for _ in range(missing))
        return True

    def _admit(self, budget, output):
        """Start the first waiting sequence: (sequence, first token, how many), or None if it has no room."""
        sequence, size = self.waiting[0], self.block_pool.block_size
        if sum(each.n for each in self.running) + sequence.n > self.max_num_seqs:
            return None
        extend_block_hashes(sequence.block_hashes, sequence.tokens, size)
        cached = ([] if sequence.skip_prefix_cache
                  else self.block_pool.find_longest_cache_hit(self._usable_hashes(sequence)))
        for block in cached:
            self.block_pool.incref(block)
        sequence.block_table, sequence.num_computed_tokens = list(cached), size * len(cached)
        count = min(budget, len(sequence.tokens) - sequence.num_computed_tokens)
        if not self._allocate_blocks(sequence, count, output):
            self._free_blocks(sequence)
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.num_cached_tokens = sequence.num_computed_tokens
        return sequence, sequence.num_computed_tokens, count

    def _usable_hashes(self, sequence):
        """Hashes of blocks that may be cached ones. One token is always computed: it gives the logits."""
        return sequence.block_hashes[1:1 + (len(sequence.tokens) - 1) // self.block_pool.block_size]

    def _free_blocks(self, sequence):
        self.block_pool.free(sequence.block_table)
        sequence.block_table, sequence.num_computed_tokens = [], 0
