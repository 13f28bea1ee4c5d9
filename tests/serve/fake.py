"""An engine without a model: it says the prompt again, character by character, through the real scheduler.

Tokens are bytes. What it says follows from the request alone, so every test knows it; "die" in a prompt ends
the process, and `pause` is how long a step takes.
"""
import os
import subprocess
import time
from collections import Counter

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.engine.block_pool import Blocks, root
from nanoinfra.serve.engine.detokenizer import Writer
from nanoinfra.serve.engine.requests import Event, Logprob, check
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.serve.processes.engine_loop import Ready

END = 256
COUNTS = ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "steps")
TEMPLATE = ("{% for m in messages %}{% if m.role == 'odd' %}{{ raise_exception('no such role') }}{% endif %}"
            "{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")


def text():
    """One token a byte, and <end>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Text(backend, frozenset([END]), "", "<end>")


class Fake:
    """Answers as Engine does. "<end>" in a prompt ends the answer there."""

    def __init__(self, pause=0.0, blocks=64, size=8, context=512, **limits):
        self.text, self.template, self.pause, self.context = text(), TEMPLATE, pause, context
        self.blocks = Blocks(blocks, size)
        self.scheduler = Scheduler(self.blocks, **limits)
        self.runs, self.counts, self.batch, self.version = {}, Counter(), [], 0

    @property
    def busy(self):
        return bool(self.runs)

    def add(self, request):
        check(request, self.context, END + 1)
        sequence = Sequence(list(request.tokens), request.n, root(version=self.version, salt=request.salt))
        self.scheduler.add(sequence)
        self.runs[sequence] = (request, 0, Writer(self.text, request.stop))
        if "die" in self.text.decode(request.tokens):
            os._exit(3)

    def abort(self, request):
        for sequence in [each for each, (owner, *_) in self.runs.items() if owner.id == request]:
            self._end(sequence)

    def reset(self):
        self.version += 1
        self.blocks.forget()

    def info(self):
        return {"context": self.context, "vocab": END + 1, "blocks": len(self.blocks.holders),
                "block_size": self.blocks.size}

    def stats(self):
        blocks, scheduler = self.blocks, self.scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting),
                "blocks": len(blocks.holders), "blocks_used": blocks.used, "blocks_known": len(blocks.known),
                "blocks_shared": sum(holders > 1 for holders in blocks.holders), "block_size": blocks.size,
                **{name: self.counts[name] for name in COUNTS}, "batch": self.batch}

    def step(self):
        time.sleep(self.pause)
        plan, self.batch = self.scheduler.plan(), []
        self.scheduler.done(plan)
        self.counts.update(steps=1, preemptions=len(plan.preempted))
        for sequence, first, count in plan.work:
            request, index, _ = self.runs[sequence]
            if first == sequence.hit and len(sequence.tokens) == sequence.prompt and not sequence.preempted:
                self.counts.update(prefix_queries=sequence.prompt, prefix_hits=sequence.hit)
            self.counts["prompt_tokens"] += max(0, min(first + count, sequence.prompt) - first)
            self.batch.append({"request": request.id, "index": index, "computed": first + count,
                               "tokens": len(sequence.tokens), "new": count, "hit": sequence.hit})
        events = [self._say(each) for sequence, first, count in plan.work
                  if first + count == len(sequence.tokens) for each in self._forked(sequence)]
        return events + [self._event(sequence, finish="length") for sequence in plan.full]

    def _forked(self, sequence):
        request, *_ = self.runs[sequence]
        twins = [self.scheduler.fork(sequence) for _ in range(1, sequence.n)]
        for index, twin in enumerate(twins, 1):
            self.runs[twin] = (request, index, Writer(self.text, request.stop))
        return [sequence, *twins]

    def _say(self, sequence):
        request, _, writer = self.runs[sequence]
        made = len(sequence.tokens) - sequence.prompt
        prompt = [] if made or not request.echo else [_logprob(*pair, request.logprobs) for pair in
                                                      enumerate(request.tokens)]
        if request.max_tokens == 0:
            return self._event(sequence, prompt=prompt, finish="length")
        token = request.tokens[made % sequence.prompt]
        sequence.tokens.append(token)
        self.counts["generation_tokens"] += 1
        ended = token == END and not request.ignore_eos
        shown = "" if ended else writer.push(token)
        finish = ("stop" if ended or writer.stopped or token in request.stop_token_ids else
                  "length" if made + 1 == min(request.max_tokens, self.context - sequence.prompt) else None)
        shown += writer.finish() if finish else ""
        said = [] if request.logprobs is None else [_logprob(made + 1, token, request.logprobs)]
        return self._event(sequence, shown, [token], said, prompt, finish)

    def _event(self, sequence, shown="", tokens=(), said=(), prompt=(), finish=None):
        request, index, _ = self.runs[sequence]
        if finish:
            self._end(sequence)
        return Event(request.id, index, shown, list(tokens), list(said), list(prompt), sequence.hit, finish)

    def _end(self, sequence):
        self.scheduler.finish(sequence)
        del self.runs[sequence]


def _logprob(place, token, top):
    """-0.25 for every token but the first; the likelier ones are the next in the alphabet."""
    if place == 0:
        return Logprob(token, None)
    likely = [(token, -0.25), *(((token + i) % END, -0.25 - i) for i in range(1, top or 0))]
    return Logprob(token, -0.25, likely[:top])


class Idle:
    """A worker without an engine, which is asked nothing but to begin, to reset and to end."""
    state, why, failed, jobs, stats = "ready", "", "", {}, {}
    ready = Ready({"context": 512, "vocab": END + 1}, text(), TEMPLATE)

    def reset(self):
        pass

    start = stop = reset

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
