"""Paged KV cache and continuous batching: KV slots, blocks, and the engine steps that a request trace takes.

A sequence of p prompt and o new tokens takes o steps, the first one for the whole prompt. It needs p + o - 1
KV slots: no step reads the keys of its last token. In blocks of s slots at most s - 1 of them stay unused,
(s - 1)/2 on average; a contiguous cache reserves the longest possible sequence.
Compared are static batches and contiguous caches with Orca (Yu et al. 2022) and vLLM (Kwon et al. 2023).
"""
from collections.abc import Sequence
from heapq import heapreplace
from math import ceil

from nanoinfra.config import ModelConfig

RequestTrace = Sequence[tuple[int, int, int]]
"""(arrival, prompt tokens, new tokens) of each request in order of arrival; the arrival is in steps. A step
computes all that each running request has left to compute."""


def kv_tokens_at_end(prompt_tokens: int, new_tokens: int) -> int:
    """KV slots that a sequence has filled when it ends."""
    return prompt_tokens + new_tokens - 1


def blocks_for_tokens(tokens: int, block_size: int) -> int:
    """The number of KV cache blocks that `tokens` need."""
    return ceil(tokens / block_size)


def unused_slots_in_last_block(tokens: int, block_size: int) -> int:
    """Unused slots in the last block of a sequence (internal fragmentation): 0 to block_size - 1."""
    return -tokens % block_size


def mean_unused_slots_per_sequence(block_size: int) -> float:
    """The mean of `unused_slots_in_last_block` over all sequence lengths."""
    return (block_size - 1) / 2


def static_batching_steps(trace: RequestTrace, max_num_seqs: int) -> int:
    """Steps until all requests are done with static batching.

    A batch of at most `max_num_seqs` waiting requests starts when the batch before has ended, and it takes as
    long as its longest request.
    """
    end, first = 0, 0
    while first < len(trace):
        begin = max(end, trace[first][0])
        batch = [new for arrival, _, new in trace[first:first + max_num_seqs] if arrival <= begin]
        end, first = begin + max(batch), first + len(batch)
    return end


def continuous_batching_steps(trace: RequestTrace, max_num_seqs: int) -> int:
    """Steps until all requests are done with continuous batching (Orca).

    The request that has waited longest starts in the step after one of `max_num_seqs` places became free.
    """
    ends = [0] * max_num_seqs                                            # a heap: when each place is free
    for arrival, _, new in trace:
        heapreplace(ends, max(arrival, ends[0]) + new)
    return max(ends)


def unlimited_batching_steps(trace: RequestTrace) -> int:
    """Steps until all requests are done where no request ever waits: a lower bound for every server."""
    return max(arrival + new for arrival, _, new in trace)


def peak_blocks_in_use(trace: RequestTrace, block_size: int) -> int:
    """The most KV cache blocks in use at a step, where no request ever waits."""
    running = [[(prompt, step - arrival) for arrival, prompt, new in trace if 0 <= step - arrival < new]
               for step in range(unlimited_batching_steps(trace))]
    return max(sum(blocks_for_tokens(prompt + age, block_size) for prompt, age in each) for each in running)


def min_steps_with_kv_memory(trace: RequestTrace, kv_slots: int, block_size: int,
                             reserved_len: int | None = None) -> float:
    """A lower bound on the steps of a server with `kv_slots` slots: slots x steps must hold all sequences.

    A sequence holds the blocks of the tokens that it has so far; with `reserved_len` it holds so many slots
    from its first step on, as a contiguous cache does.
    """
    used = sum(reserved_len or block_size * blocks_for_tokens(prompt + age, block_size)
               for _, prompt, new in trace for age in range(new))
    return used / kv_slots


def blocks_saved_by_prefix_caching(prefix_tokens: int, sequences: int, block_size: int) -> int:
    """Blocks that prefix caching saves where `sequences` begin with the same `prefix_tokens`.

    All but the first sequence share the prefix's full blocks. A prefix hit covers at most all tokens but the
    last, which changes nothing where each sequence has at least one token of its own.
    """
    return (sequences - 1) * (prefix_tokens // block_size)


def tp_serving_collectives(config: ModelConfig, tp: int, steps: int, computed_tokens: int, new_tokens: int,
                           dtype_bytes: int) -> dict[str, tuple[int, int]]:
    """{tag: (collectives, payload bytes)} of tensor-parallel serving, on one of `tp` ranks.

    In `steps` steps `computed_tokens` go through the model and `new_tokens` are sampled. Each step
    all-reduces the hidden states once for the embedding and twice a layer, and all-gathers the logits of the
    sequences that get a token, ceil(V/tp) columns a rank. Every step samples at least one token.
    """
    if tp == 1:
        return {"layers": (0, 0), "ends": (0, 0)}
    hidden_states = computed_tokens * config.width * dtype_bytes
    logits = new_tokens * tp * ceil(config.vocab / tp) * dtype_bytes
    return {"layers": (2 * config.layers * steps, 2 * config.layers * hidden_states),
            "ends": (2 * steps, hidden_states + logits)}
