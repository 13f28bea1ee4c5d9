"""The engine: many requests through one decoder, step by step. What the server drives, and RL's rollouts.

A step is a plan of the scheduler's: one row of tokens from all sequences goes through the trainer's own
module, with the paged cache as an argument; where a sequence has caught up, its last logits give a token. The
model's weights are only read, so whoever shares them trains on undisturbed. Under tensor parallelism every
rank runs the same engine on the same requests: all have the same logits and draw the same tokens. What goes
wrong with one request ends that request; only the model's own pass is everybody's.
"""
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import torch

from nanoinfra.distributed.ledger import Ledger
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.kernels.cpu import decode_kernels
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.fill_model import empty
from nanoinfra.parallel.parallelize import serving
from nanoinfra.serve.engine import cpu_decoder_block, packed_linear
from nanoinfra.serve.engine.block_pool import Blocks, root
from nanoinfra.serve.engine.detokenizer import Writer
from nanoinfra.serve.engine.paged_attention import PagedKV
from nanoinfra.serve.engine.request_state import Run
from nanoinfra.serve.engine.requests import Event, Logprob, Request, check
from nanoinfra.serve.engine.sampler import Sampler, finite, logprobs, without
from nanoinfra.serve.engine.scheduler import Scheduler, Sequence
from nanoinfra.serve.options import EngineOptions
from nanoinfra.train.pretrained import open_pretrained


class Engine:
    """Requests in by `add`, a step at a time by `step`, which says what is new. Not for several threads.

    `model` is a Decoder with its weights; `blocks` of `size` tokens are taken for keys and values, in its
    dtype; `text` makes text of tokens, without it events have tokens alone; `template` is for whoever renders
    chats. Further arguments: Scheduler's. `ledger` holds the collectives of the last step.
    """

    def __init__(self, model: Decoder, text: Text | None = None, template: str | None = None, *, blocks: int,
                 size: int = 16, ledger: Ledger | None = None, **limits):
        self.model, self.text, self.template, self.ledger = model, text, template, ledger or Ledger()
        self.kv, self.blocks = PagedKV(model, blocks, size), Blocks(blocks, size)
        self.scheduler, self.likeliest = Scheduler(self.blocks, **limits), likeliest
        self.runs: dict[Sequence, Run] = {}
        self.of: dict[str, list[Run]] = defaultdict(list)
        self.version, self.counts, self.batch = 0, Counter(), []

    @property
    def busy(self) -> bool:
        """Is there work?"""
        return bool(self.runs)

    def add(self, request: Request) -> None:
        """Take a request. ValueError for one that cannot be answered; QueueFull where too much waits."""
        check(request, self.model.config.cached_context, self.model.config.vocab)
        if request.id in self.of:
            raise ValueError(f"request {request.id!r} is here already; give each an id of its own")
        start = root(version=self.version, salt=request.salt)
        sequence = Sequence(list(request.tokens), request.n, start, fresh=request.echo)
        run = self._run(request, 0, sequence)
        self.scheduler.add(sequence)                                     # the last that may raise
        self._enter(run)

    def abort(self, request: str) -> None:
        """Forget a request; no event follows. An id that is not here is none."""
        for run in self.of.pop(request, []):
            if self.runs.pop(run.sequence, None):
                self.scheduler.finish(run.sequence)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One step of the model for all that the scheduler plans; what is new, at most an event a run.

        A request that fails ends with an event whose `finish` is "error": an exception was raised while it
        alone was handled, or its numbers are not finite, even computed a second time from its tokens.
        """
        plan, events = self.scheduler.plan(), []
        self.ledger.take()                   # a server's would grow for ever
        if plan.work:
            work, tokens, places = self.kv.begin(plan)
            hidden = self.model.hidden(tokens, places, self.kv)[0]                       # (N, C)
            self.scheduler.done(plan)
            self._count(plan, work)
            events += self._mend(work, hidden)
            events += self._read_prompts(work, hidden)
            events += self._write(work, hidden)
        for sequence in plan.full:                                       # the pool is the limit
            if sequence in self.runs:                                    # else a twin's failure has ended it
                run = self.runs[sequence]
                events.append(self._end(run, run.writer.finish() if run.writer else "", [], [], "length"))
        return events

    def reset(self) -> None:
        """New weights: what was computed with the old ones is known no more."""
        self.version += 1
        self.blocks.forget()

    def info(self) -> dict:
        """What does not change: context and vocabulary of the model, the KV memory's blocks."""
        config = self.model.config
        return {"context": config.cached_context, "vocab": config.vocab, "blocks": len(self.blocks.holders),
                "block_size": self.blocks.size}

    def stats(self) -> dict:
        """How it stands, and counts since the start; `batch` is who was in the last step."""
        blocks, scheduler = self.blocks, self.scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting),
                "blocks": len(blocks.holders), "blocks_used": blocks.used, "blocks_known": len(blocks.known),
                "blocks_shared": sum(holders > 1 for holders in blocks.holders), "block_size": blocks.size,
                **{name: self.counts[name] for name in COUNTS}, "batch": self.batch}

    def _run(self, request, index, sequence):
        seed = request.sampling.seed
        sampler = Sampler(request.sampling, request.id if seed is None else seed, index)
        writer = Writer(self.text, request.stop) if self.text else None
        return Run(request, index, sequence, sampler, writer)

    def _enter(self, run):
        self.runs[run.sequence] = run
        self.of[run.request.id].append(run)

    def _count(self, plan, work):
        counts, self.batch = self.counts, []
        counts["steps"] += 1
        counts["preemptions"] += len(plan.preempted)
        for sequence, first, count in work:
            run = self.runs[sequence]
            if first == sequence.hit and not run.made and not sequence.preempted:
                counts["prefix_queries"] += sequence.prompt
                counts["prefix_hits"] += sequence.hit
            counts["prompt_tokens"] += max(0, min(first + count, sequence.prompt) - first)
            self.batch.append({"request": run.request.id, "index": run.index, "computed": first + count,
                               "tokens": len(sequence.tokens), "new": count, "hit": sequence.hit})

    def _mend(self, work, hidden):
        """Who has rows of `hidden` (N, C) that are not finite begins again; the events of those who did."""
        sound, events, at = finite(hidden), [], 0
        for sequence, _, count in work:
            if not all(sound[at:at + count]) and sequence in self.runs:
                events += self._begin_again(self.runs[sequence])
            at += count
        return events

    def _begin_again(self, run):
        """What its blocks hold, nobody shares from now on. Once it is computed anew; then it fails."""
        self.blocks.evict(run.sequence.table)
        if run.again:
            return [self._fail(run, "the model's numbers for this sequence are not finite, computed twice")]
        run.again = True
        self.scheduler.preempt(run.sequence)
        self.counts["preemptions"] += 1
        return []

    def _fail(self, run, why):
        self.abort(run.request.id)
        return Event(run.request.id, run.index, why, finish="error")

    def _guarded(self, run: Run, handle: Callable[..., list[Event]], *args) -> list[Event]:
        """`handle(run, *args)`; an exception ends the request. No collective: one rank may be alone in it."""
        if run.sequence not in self.runs:                                # ended by a twin's failure
            return []
        try:
            return handle(run, *args)
        except Exception as error:
            traceback.print_exc()
            return [self._fail(run, f"the engine failed on this request: {type(error).__name__}: {error}")]

    def _read_prompts(self, work, hidden):
        """Log-probabilities of prompts, chunk by chunk, for requests that echo; events of those that fail."""
        at, events = 0, []
        for sequence, first, count in work:
            rows, run = hidden[at:at + count], self.runs.get(sequence)
            at += count
            if run and run.request.echo and sequence.computed:           # 0: it begins again
                run.prompt = run.prompt or [Logprob(sequence.tokens[0], None)]
                known = len(run.prompt)                                  # past `first`, once preempted
                ahead = sequence.tokens[known:min(first + count + 1, sequence.prompt)]
                logits = self.model.head(rows[known - 1 - first:][:len(ahead)])          # (T, V)
                events += self._guarded(run, self._read_prompt, logits, ahead)
        return events

    def _read_prompt(self, run, logits, ahead):
        if not all(finite(logits)):
            return self._begin_again(run)
        run.prompt += logprobs(logits, ahead, run.request.logprobs or 0)
        return []

    def _write(self, work, hidden):
        """A token for every sequence that has caught up; the events of all."""
        lasts = [*accumulate((count for _, _, count in work), initial=-1)][1:]
        ready = [(last, sequence) for last, (sequence, _, _) in zip(lasts, work)
                 if sequence.computed == len(sequence.tokens)]
        if not ready:
            return []
        logits = self.model.head(hidden[[last for last, _ in ready]])                    # (B, V)
        sound, likeliest, events = finite(logits), self.likeliest(logits), []
        for i, (_, sequence) in enumerate(ready):
            if sequence in self.runs and not sound[i]:
                events += self._begin_again(self.runs[sequence])
            elif sequence in self.runs:
                for run in self._forked(sequence):
                    events += self._guarded(run, self._say, logits[i], likeliest[i])
        return events

    def _forked(self, sequence):
        """The runs that go on from here: one, or once its prompt is computed all n of a request."""
        first = self.runs[sequence]
        if sequence.n == 1:
            return [first]
        for index in range(1, sequence.n):
            run = self._run(first.request, index, self.scheduler.fork(sequence))
            run.prompt = first.prompt
            run.sampler.share(first.sampler)
            self._enter(run)
        return list(self.of[first.request.id])

    def _say(self, run, logits, likeliest):
        """The next token of `run`, from its logits (V,); its event."""
        request, sequence = run.request, run.sequence
        if request.max_tokens == 0:                                      # the prompt alone was to be scored
            return [self._end(run, "", [], [], "length")]
        ends = self.text.ends if self.text else frozenset()
        banned, plain = run.banned(ends), run.sampler.plain
        token = likeliest if plain and not banned else run.sampler.draw(
            without(logits, banned), sequence.tokens, sequence.prompt)
        said = [] if request.logprobs is None else logprobs(logits[None], [token], request.logprobs)
        text, finish = run.push(token, ends, self.model.config.cached_context - sequence.prompt)
        self.counts["generation_tokens"] += 1
        how = self._end if finish else self._event
        return [how(run, text, [token], said, finish)]

    def _end(self, run, text, tokens, said, finish):
        self.scheduler.finish(run.sequence)
        del self.runs[run.sequence]
        if not any(other.sequence in self.runs for other in self.of[run.request.id]):
            del self.of[run.request.id]
        return self._event(run, text, tokens, said, finish)

    def _event(self, run, text, tokens, said, finish=None):
        prompt = run.prompt if run.made <= 1 else []
        return Event(run.request.id, run.index, text, tokens, said, prompt, run.sequence.hit, finish)


def likeliest(logits: torch.Tensor) -> list[int]:
    """The best of each row of `logits` (B, V), one token each."""
    return logits.max(-1).indices.tolist()               # argmax is five times slower in bf16


COUNTS = ("prompt_tokens", "generation_tokens", "prefix_queries", "prefix_hits", "preemptions", "steps")


def open_engine(options: EngineOptions, mesh) -> Engine:
    """The engine of `nanoinfra serve` on this rank: weights, tokenizer, the blocks that --kv-memory holds."""
    weights, dtype = open_pretrained(options.model, mesh.world), getattr(torch, options.dtype)
    each = options.block_size * kv_cache_bytes_per_token(weights.config, dtype.itemsize, mesh.tp.size)
    n = options.kv_memory // each
    if n < 2:
        raise ValueError(f"--kv-memory {options.kv_memory} holds {n} blocks of {options.block_size} tokens, "
                         f"{each} bytes each on a rank; give at least {2 * each}")
    model = serving(empty(weights.config), mesh, weights.read, dtype)
    engine = Engine(model, weights.text, weights.template, blocks=n, size=options.block_size,
                    ledger=mesh.ledger, budget=options.budget, seats=options.seats, queue=options.queue,
                    queue_tokens=options.queue_tokens)
    alone_on_cpu = mesh.device == "cpu" and mesh.tp.size == 1 and dtype in packed_linear.DTYPES
    said = use_cpu_kernels(engine) if alone_on_cpu else "torch's operations compute everything"
    if mesh.tp.rank == 0:
        print(f"nanoinfra: {said}", file=sys.stderr, flush=True)
    return engine


def use_cpu_kernels(engine: Engine) -> str:
    """On one CPU rank: packed weights and, as far as model and machine allow, passes compiled from C.

    Returns in a sentence who computes what now.
    """
    model, dtype = engine.model, engine.model.embed.weight.dtype
    try:
        kernels, why = cpu_decoder_block.compile_for(model, engine.kv), ""
    except RuntimeError as error:
        kernels, why = None, f", at half the speed: {error}"
    packed_linear.pack(model, kernels and kernels.gemv)
    packed_linear.warm(model, engine.scheduler.budget, engine.scheduler.seats)
    between = "torch's operations"
    if kernels and cpu_decoder_block.suit(model.config):
        engine.kv = cpu_decoder_block.install(model, engine.kv, kernels)
        engine.likeliest = partial(decode_kernels.likeliest, kernels)
        between = "passes in C"
    reason = packed_linear.unpackable(dtype)
    many = f"torch's linear (oneDNN does not pack: {reason})" if reason else "oneDNN's packed weights"
    one = f"C ({kernels.instructions().decode()})" if kernels else "the same"
    return f"products of many rows by {many}, of one by {one}, all between by {between}{why}"
