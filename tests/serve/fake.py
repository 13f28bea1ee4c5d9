"""An engine without a model: it says the prompt again, character by character, through the real scheduler.

Tokens are bytes. What it says follows from the request alone, so every test knows it; "die" in a prompt ends
the process, and `pause` is how long a step takes.
"""
import os
import subprocess
import time
from collections import Counter

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.engine.block_pool import BlockPool, root_block_hash
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Logprob, RequestOutput, check_request
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.serve.processes.engine_loop import EngineReady

END = 256
COUNTS = ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "steps")
TEMPLATE = ("{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
            "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")


def text():
    """One token a byte, and <end>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, frozenset([END]), "", "<end>")


class Fake:
    """Answers as Engine does. "<end>" in a prompt ends the answer there."""

    def __init__(self, pause=0.0, blocks=64, size=8, context=512, **limits):
        self.tokenizer, self.chat_template, self.pause, self.context = text(), TEMPLATE, pause, context
        self.block_pool = BlockPool(blocks, size)
        self.scheduler = Scheduler(self.block_pool, **limits)
        self.runs, self.counts, self.last_batch, self.weights_version = {}, Counter(), [], 0

    @property
    def has_unfinished_requests(self):
        return bool(self.runs)

    def add_request(self, request):
        check_request(request, self.context, END + 1)
        root = root_block_hash(weights_version=self.weights_version, cache_salt=request.cache_salt)
        sequence = Sequence(list(request.prompt_token_ids), request.n, root)
        self.scheduler.add_sequence(sequence)
        self.runs[sequence] = (request, 0, StopStringDetokenizer(self.tokenizer, request.stop))
        if "die" in self.tokenizer.decode(request.prompt_token_ids):
            os._exit(3)

    def abort_request(self, request):
        for sequence in [each for each, (owner, *_) in self.runs.items() if owner.request_id == request]:
            self._end(sequence)

    def reset_prefix_cache(self):
        self.weights_version += 1
        self.block_pool.reset_prefix_cache()

    def static_info(self):
        return {"context": self.context, "vocab": END + 1, "blocks": len(self.block_pool.ref_counts),
                "block_size": self.block_pool.block_size}

    def stats(self):
        blocks, scheduler = self.block_pool, self.scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting),
                "blocks": len(blocks.ref_counts), "blocks_used": blocks.num_used_blocks,
                "blocks_known": len(blocks.hash_to_block),
                "blocks_shared": sum(holders > 1 for holders in blocks.ref_counts),
                "block_size": blocks.block_size,
                **{name: self.counts[name] for name in COUNTS}, "batch": self.last_batch}

    def step(self):
        time.sleep(self.pause)
        plan, self.last_batch = self.scheduler.schedule(), []
        self.scheduler.mark_computed(plan)
        self.counts.update(steps=1, preemptions=len(plan.preempted))
        for sequence, first, count in plan.scheduled_chunks:
            request, index, _ = self.runs[sequence]
            if (first == sequence.num_cached_tokens and len(sequence.tokens) == sequence.num_prompt_tokens
                    and not sequence.num_preemptions):
                self.counts.update(prefix_queries=sequence.num_prompt_tokens,
                                   prefix_hits=sequence.num_cached_tokens)
            self.counts["prompt_tokens"] += max(0, min(first + count, sequence.num_prompt_tokens) - first)
            self.last_batch.append({"request": request.request_id, "index": index, "computed": first + count,
                                    "tokens": len(sequence.tokens), "new": count,
                                    "hit": sequence.num_cached_tokens})
        events = [self._say(each) for sequence, first, count in plan.scheduled_chunks
                  if first + count == len(sequence.tokens) for each in self._forked(sequence)]
        return events + [self._event(sequence, finish="length") for sequence in plan.out_of_blocks]

    def _forked(self, sequence):
        request, *_ = self.runs[sequence]
        twins = [self.scheduler.fork_sequence(sequence) for _ in range(1, sequence.n)]
        for index, twin in enumerate(twins, 1):
            self.runs[twin] = (request, index, StopStringDetokenizer(self.tokenizer, request.stop))
        return [sequence, *twins]

    def _say(self, sequence):
        request, _, writer = self.runs[sequence]
        made = len(sequence.tokens) - sequence.num_prompt_tokens
        prompt = [] if made or not request.prompt_logprobs else [_logprob(*pair, request.logprobs) for pair in
                                                                 enumerate(request.prompt_token_ids)]
        if request.max_tokens == 0:
            return self._event(sequence, prompt=prompt, finish="length")
        token = request.prompt_token_ids[made % sequence.num_prompt_tokens]
        sequence.tokens.append(token)
        self.counts["generation_tokens"] += 1
        ended = token == END and not request.ignore_eos
        shown = "" if ended else writer.push_token(token)
        finish = ("stop" if ended or writer.stopped or token in request.stop_token_ids else
                  "length" if made + 1 == min(request.max_tokens,
                                              self.context - sequence.num_prompt_tokens) else None)
        shown += writer.flush() if finish else ""
        said = [] if request.logprobs is None else [_logprob(made + 1, token, request.logprobs)]
        return self._event(sequence, shown, [token], said, prompt, finish)

    def _event(self, sequence, shown="", tokens=(), said=(), prompt=(), finish=None):
        request, index, _ = self.runs[sequence]
        if finish:
            self._end(sequence)
        return RequestOutput(request.request_id, index, shown, list(tokens), list(said), list(prompt),
                             sequence.num_cached_tokens, finish)

    def _end(self, sequence):
        self.scheduler.finish_sequence(sequence)
        del self.runs[sequence]


def _logprob(place, token, top):
    """-0.25 for every token but the first; the likelier ones are the next in the alphabet."""
    if place == 0:
        return Logprob(token, None)
    likely = [(token, -0.25), *(((token + i) % END, -0.25 - i) for i in range(1, top or 0))]
    return Logprob(token, -0.25, likely[:top])


class Idle:
    """A worker without an engine, which is asked nothing but to begin, to reset and to end."""
    state, state_reason, load_error, streams, stats = "ready", "", "", {}, {}
    engine_ready = EngineReady({"context": 512, "vocab": END + 1}, text(), TEMPLATE)

    def reset_prefix_cache(self):
        pass

    start = stop = reset_prefix_cache

    async def join(self):
        pass


def fake(team, load=0.0, **options):
    """The factory, which takes `load` seconds."""
    time.sleep(load)
    return Fake(**options)


def compiling(team):
    """A factory that waits for a program."""
    subprocess.run(["sleep", "600"])


def meeting(team, **options):
    """A factory of engines each of whose steps waits for all ranks, as collectives do."""
    engine = Fake(**options)
    step = engine.step

    def together():
        for pipe in team.pipes:
            pipe.send("here")
        for pipe in team.pipes:
            pipe.recv()
        return step()
    engine.step = together
    return engine
