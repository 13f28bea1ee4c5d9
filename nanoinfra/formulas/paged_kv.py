"""KV memory in pages, and the steps that a trace of requests takes.

A sequence of p prompt and o new tokens takes o steps, the first with all of its prompt, and keeps p + o - 1:
nobody reads its last token. In blocks of s tokens at most s - 1 places stay empty, (s - 1)/2 on average; one
stretch for the longest possible leaves the difference to that. Static batches and contiguous caches: what was
before Orca (Yu et al. 2022) and vLLM (Kwon et al. 2023). A trace is (arrival, prompt, new) of each request in
order of arrival, in steps and tokens; a step gives everyone in the batch what it has left to compute.
"""
from collections.abc import Sequence
from heapq import heapreplace
from math import ceil

from nanoinfra.config import ModelConfig

Trace = Sequence[tuple[int, int, int]]


def kept(prompt: int, new: int) -> int:
    """Tokens with keys and values in memory when a sequence ends."""
    return prompt + new - 1


def blocks(tokens: int, size: int) -> int:
    """Blocks of `size` tokens that hold so many."""
    return ceil(tokens / size)


def empty(tokens: int, size: int) -> int:
    """Places of a sequence's last block that hold nothing: 0 to size - 1."""
    return -tokens % size


def empty_on_average(size: int) -> float:
    """The same for lengths of which nothing is known."""
    return (size - 1) / 2


def static_steps(trace: Trace, seats: int) -> int:
    """Steps until all are done, where a batch of at most `seats` that wait starts when the last one ended.

    It takes as long as its longest.
    """
    end, first = 0, 0
    while first < len(trace):
        begin = max(end, trace[first][0])
        batch = [new for arrival, _, new in trace[first:first + seats] if arrival <= begin]
        end, first = begin + max(batch), first + len(batch)
    return end


def orca_steps(trace: Trace, seats: int) -> int:
    """Steps where each seat is given to who waits longest, in the step after it became free: Orca."""
    ends = [0] * seats                                                   # of who sits there, a heap
    for arrival, _, new in trace:
        heapreplace(ends, max(arrival, ends[0]) + new)
    return max(ends)


def free_steps(trace: Trace) -> int:
    """Steps where nobody ever waits: no server is done before."""
    return max(arrival + new for arrival, _, new in trace)


def peak_blocks(trace: Trace, size: int) -> int:
    """Blocks in use in the fullest step, where nobody ever waits."""
    here = [[(prompt, step - arrival) for arrival, prompt, new in trace if 0 <= step - arrival < new]
            for step in range(free_steps(trace))]
    return max(sum(blocks(prompt + age, size) for prompt, age in each) for each in here)


def least_steps(trace: Trace, places: int, size: int, longest: int | None = None) -> float:
    """No server is done in fewer: memory of `places` tokens times steps must hold everyone's while it runs.

    A sequence holds the blocks of what it has so far; with `longest`, room for so many from its first step.
    """
    used = sum(longest or size * blocks(prompt + age, size) for _, prompt, new in trace for age in range(new))
    return used / places


def saved_blocks(prefix: int, sequences: int, size: int) -> int:
    """Blocks spared where `sequences` begin with the same `prefix` tokens: its full ones, but the first's.

    The cap of n - 1 tokens on a hit costs nothing where each has at least one token of its own.
    """
    return (sequences - 1) * (prefix // size)


def served(config: ModelConfig, t: int, steps: int, tokens: int, new: int,
           dtype_bytes: int) -> dict[str, tuple[int, int]]:
    """{tag: (collectives, payload bytes)} on one of `t` ranks: `new` tokens made, `tokens` computed for them.

    In each of `steps`: an all-reduce of the stream for the embedding, two a layer; the logits of the
    sequences that get a token are gathered, ceil(V/t) columns a rank. Every step makes a token.
    """
    if t == 1:
        return {"layers": (0, 0), "ends": (0, 0)}
    stream, logits = tokens * config.width * dtype_bytes, new * t * ceil(config.vocab / t) * dtype_bytes
    return {"layers": (2 * config.layers * steps, 2 * config.layers * stream),
            "ends": (2 * steps, stream + logits)}
