"""The serving engine: many requests through one decoder, step by step, with continuous batching.

A step runs what the scheduler put out: one row of tokens of all sequences goes through the trainer's own
module, with the paged KV cache as an argument; a sequence whose tokens are all computed gets a new one from
its last logits. The weights are only read, so the engine can share them with a training run. Under tensor
parallelism every rank runs the same engine on the same requests: all have the same logits and sample the same
tokens. What goes wrong with one request ends that request alone; an error in the model's pass ends the step.
"""
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import accumulate

import torch

from nanoinfra.distributed.comm_log import CommLog
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.engine.block_pool import BlockPool, root_block_hash
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.request_and_output import Logprob, Request, RequestOutput, check_request
from nanoinfra.serve.engine.sampler import Sampler, gather_logprobs, mask_out_tokens, rows_are_finite
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.serve.engine.sequence_generation_state import RequestState


class Engine:
    """Takes requests with `add_request`; each `step` returns what is new of them. Not thread-safe.

    `model` is a Decoder with its weights; the KV cache has `num_blocks` blocks of `block_size` tokens, in the
    model's dtype. `tokenizer` detokenizes the outputs, without it they have token ids alone; `chat_template`
    is kept for the server. Further arguments are the Scheduler's. `ledger` holds the last step's collectives.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None = None, chat_template: str | None = None,
                 *,
                 num_blocks: int, block_size: int = 16, ledger: CommLog | None = None, **scheduler_limits):
        self.model, self.ledger = model, ledger or CommLog()
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.kv_cache = PagedKVCache(model, num_blocks, block_size)
        self.block_pool = BlockPool(num_blocks, block_size)
        self.scheduler, self.argmax = Scheduler(self.block_pool, **scheduler_limits), argmax_tokens
        self.states: dict[Sequence, RequestState] = {}
        self.states_of_request: dict[str, list[RequestState]] = defaultdict(list)
        self.weights_version, self.counts = 0, Counter()
        self.last_batch = []                 # a dict for each sequence of the last step, for `stats`

    @property
    def has_unfinished_requests(self) -> bool:
        """Is there anything to compute?"""
        return bool(self.states)

    def add_request(self, request: Request) -> None:
        """Take a request. ValueError for one that cannot be answered; QueueFull where too much waits."""
        check_request(request, self.model.config.max_cacheable_seq_len, self.model.config.vocab)
        if request.request_id in self.states_of_request:
            raise ValueError(f"request {request.request_id!r} is here already; give each an id of its own")
        root = root_block_hash(weights_version=self.weights_version, cache_salt=request.cache_salt)
        sequence = Sequence(list(request.prompt_token_ids), request.n, root,
                            skip_prefix_cache=request.prompt_logprobs)
        state = self._new_state(request, 0, sequence)
        self.scheduler.add_sequence(sequence)                            # the last that may raise
        self._keep_state(state)

    def abort_request(self, request_id: str) -> None:
        """Request cancellation: drop a request and free its blocks; no output follows. Unknown ids pass."""
        for state in self.states_of_request.pop(request_id, []):
            if self.states.pop(state.sequence, None):
                self.scheduler.finish_sequence(state.sequence)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Schedule and compute one step of the model; at most one output for each continuation.

        A request that fails ends with an output whose finish_reason is "error": an exception was raised while
        it alone was handled, or its numbers are not finite, even computed a second time from its tokens.
        """
        scheduled, outputs = self.scheduler.schedule(), []
        self.ledger.take_records()                   # a server's would grow for ever
        if scheduled.scheduled_chunks:
            chunks, tokens, positions = self.kv_cache.prepare_inputs(scheduled)
            hidden = self.model.hidden_states(tokens, positions, self.kv_cache)[0]              # (N, C)
            self.scheduler.mark_computed(scheduled)
            self._count(scheduled, chunks)
            outputs += self._recompute_nonfinite(chunks, hidden)
            outputs += self._score_prompts(chunks, hidden)
            outputs += self._sample(chunks, hidden)
        for sequence in scheduled.out_of_blocks:                         # the pool is the limit
            if sequence in self.states:      # else it was ended by an error in another of its n continuations
                state = self.states[sequence]
                rest = state.detokenizer.flush() if state.detokenizer else ""
                outputs.append(self._finish(state, rest, [], [], "length"))
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes. Call it after a change of weights: old keys and values are wrong then."""
        self.weights_version += 1
        self.block_pool.reset_prefix_cache()

    def static_info(self) -> dict[str, int]:
        """What never changes: the model's context and vocabulary, the number and size of KV blocks."""
        config = self.model.config
        return {"context": config.max_cacheable_seq_len, "vocab": config.vocab,
                "blocks": len(self.block_pool.ref_counts), "block_size": self.block_pool.block_size}

    def stats(self) -> dict:
        """Running and waiting sequences, block usage, counts since the start, and the last step's batch."""
        pool, scheduler = self.block_pool, self.scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting),
                "blocks": len(pool.ref_counts), "blocks_used": pool.num_used_blocks,
                "blocks_known": len(pool.hash_to_block),
                "blocks_shared": sum(count > 1 for count in pool.ref_counts), "block_size": pool.block_size,
                **{name: self.counts[name] for name in _COUNTER_NAMES}, "batch": self.last_batch}

    def _new_state(self, request, index, sequence):
        seed = request.sampling_params.seed
        sampler = Sampler(request.sampling_params, request.request_id if seed is None else seed, index)
        detokenizer = StopStringDetokenizer(self.tokenizer, request.stop) if self.tokenizer else None
        return RequestState(request, index, sequence, sampler, detokenizer)

    def _keep_state(self, state):
        self.states[state.sequence] = state
        self.states_of_request[state.request.request_id].append(state)

    def _count(self, scheduled, chunks):
        counts, self.last_batch = self.counts, []
        counts["steps"] += 1
        counts["preemptions"] += len(scheduled.preempted)
        for sequence, first, count in chunks:
            state, cached = self.states[sequence], sequence.num_cached_tokens
            if first == cached and not state.num_output_tokens and not sequence.num_preemptions:
                counts["prefix_queries"] += sequence.num_prompt_tokens
                counts["prefix_hits"] += cached
            counts["prompt_tokens"] += max(0, min(first + count, sequence.num_prompt_tokens) - first)
            self.last_batch.append({"request": state.request.request_id, "index": state.index,
                                    "computed": first + count, "tokens": len(sequence.tokens), "new": count,
                                    "hit": cached})

    def _recompute_nonfinite(self, chunks, hidden):
        """Preempt the sequences whose rows of `hidden` (N, C) are not finite; outputs of those that fail."""
        finite = rows_are_finite(hidden)
        row, outputs = 0, []
        for sequence, _, count in chunks:
            if not all(finite[row:row + count]) and sequence in self.states:
                outputs += self._recompute_once(self.states[sequence])
            row += count
        return outputs

    def _recompute_once(self, state):
        """Take its blocks out of the prefix cache and preempt it; the second time, the request fails."""
        self.block_pool.evict_cached_blocks(state.sequence.block_table)
        if state.recomputed:
            return [self._fail(state, "the model's numbers for this sequence are not finite, computed twice")]
        state.recomputed = True
        self.scheduler.preempt(state.sequence)
        self.counts["preemptions"] += 1
        return []

    def _fail(self, state, why):
        self.abort_request(state.request.request_id)
        return RequestOutput(state.request.request_id, state.index, why, finish_reason="error")

    def _guarded(self, state: RequestState, handle: Callable[..., list[RequestOutput]],
                 *args) -> list[RequestOutput]:
        """`handle(state, *args)`; an exception fails the request. No collective in it: ranks may differ."""
        if state.sequence not in self.states:                            # another continuation has failed
            return []
        try:
            return handle(state, *args)
        except Exception as error:
            traceback.print_exc()
            return [self._fail(state, f"the engine failed on this request: {type(error).__name__}: {error}")]

    def _score_prompts(self, chunks, hidden):
        """Gather prompt log-probabilities, chunk by chunk, where requests want them; outputs of failures."""
        row, outputs = 0, []
        for sequence, first, count in chunks:
            rows, state = hidden[row:row + count], self.states.get(sequence)
            row += count
            if state and state.request.prompt_logprobs and sequence.num_computed_tokens:    # 0: preempted
                state.prompt_logprobs = state.prompt_logprobs or [Logprob(sequence.tokens[0], None)]
                known = len(state.prompt_logprobs)                       # past `first` after a preemption
                ahead = sequence.tokens[known:min(first + count + 1, sequence.num_prompt_tokens)]
                logits = self.model.head(rows[known - 1 - first:][:len(ahead)])          # (T, V)
                outputs += self._guarded(state, self._score_prompt, logits, ahead)
        return outputs

    def _score_prompt(self, state, logits, ahead):
        if not all(rows_are_finite(logits)):
            return self._recompute_once(state)
        state.prompt_logprobs += gather_logprobs(logits, ahead, state.request.logprobs or 0)
        return []

    def _sample(self, chunks, hidden):
        """Sample a token for every sequence whose tokens are all computed; the outputs of all."""
        ends = [*accumulate((count for _, _, count in chunks), initial=-1)][1:]
        ready = [(row, sequence) for row, (sequence, _, _) in zip(ends, chunks)
                 if sequence.num_computed_tokens == len(sequence.tokens)]
        if not ready:
            return []
        logits = self.model.head(hidden[[row for row, _ in ready]])                      # (B, V)
        finite, likeliest = rows_are_finite(logits), self.argmax(logits)
        outputs = []
        for i, (_, sequence) in enumerate(ready):
            if sequence in self.states and not finite[i]:
                outputs += self._recompute_once(self.states[sequence])
            elif sequence in self.states:
                for state in self._fork(sequence):
                    outputs += self._guarded(state, self._append_token, logits[i], likeliest[i])
        return outputs

    def _fork(self, sequence):
        """The states that go on from here: one, or all n of a request once its prompt is computed."""
        first = self.states[sequence]
        if sequence.n == 1:
            return [first]
        for index in range(1, sequence.n):
            state = self._new_state(first.request, index, self.scheduler.fork_sequence(sequence))
            state.prompt_logprobs = first.prompt_logprobs
            state.sampler.share_logit_bias(first.sampler)
            self._keep_state(state)
        return list(self.states_of_request[first.request.request_id])

    def _append_token(self, state, logits, likeliest):
        """Sample the next token of `state` from its logits (V,); its output."""
        request, sequence = state.request, state.sequence
        if request.max_tokens == 0:                                      # only the prompt was to be scored
            return [self._finish(state, "", [], [], "length")]
        eos_token_ids = self.tokenizer.eos_token_ids if self.tokenizer else frozenset()
        banned = state.banned_token_ids(eos_token_ids)
        if state.sampler.is_plain_argmax and not banned:
            token = likeliest
        else:
            token = state.sampler.sample_next_token(mask_out_tokens(logits, banned), sequence.tokens,
                                                    sequence.num_prompt_tokens)
        logprobs = ([] if request.logprobs is None
                    else gather_logprobs(logits[None], [token], request.logprobs))
        room = self.model.config.max_cacheable_seq_len - sequence.num_prompt_tokens
        text, finish_reason = state.append_token(token, eos_token_ids, room)
        self.counts["generation_tokens"] += 1
        if finish_reason:
            return [self._finish(state, text, [token], logprobs, finish_reason)]
        return [self._output(state, text, [token], logprobs)]

    def _finish(self, state, text, token_ids, logprobs, finish_reason):
        self.scheduler.finish_sequence(state.sequence)
        del self.states[state.sequence]
        siblings = self.states_of_request[state.request.request_id]
        if not any(other.sequence in self.states for other in siblings):
            del self.states_of_request[state.request.request_id]
        return self._output(state, text, token_ids, logprobs, finish_reason)

    def _output(self, state, text, token_ids, logprobs, finish_reason=None):
        prompt_logprobs = state.prompt_logprobs if state.num_output_tokens <= 1 else []
        return RequestOutput(state.request.request_id, state.index, text, token_ids, logprobs,
                             prompt_logprobs,
                             state.sequence.num_cached_tokens, finish_reason)


def argmax_tokens(logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row of `logits` (B, V)."""
    return logits.max(-1).indices.tolist()               # argmax is five times slower in bf16


_COUNTER_NAMES = ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions",
                  "steps")
