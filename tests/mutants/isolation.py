"""Known-wrong servers in which one request is everybody's trouble: NaN that travels, exceptions that spread.

`serve` runs requests through the real engine while keys, values or logits are spoiled; a mutant of the
library is patched in while it runs.
"""
import contextlib
import functools
import io
import random
from unittest import mock

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.engine import engine as engines
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.engine.sampler import Sampler
from tests.serve.ref_counts import check_ref_counts

CONFIG = ModelConfig(vocab=97, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=40, context=64)
GREEDY, NEW, NAN = SamplingParams(temperature=0), 8, float("nan")
isolation = Check("isolation")
torch.set_num_threads(1)                     # in products as small as these, a second one is only waited for


@functools.cache
def model():
    net, draws = Decoder(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.4 if parameter.dim() > 1 else 0.5, 0.4 if parameter.dim() > 1 else 1.5,
                               generator=draws)
    return net.double()


def ask(seed, length, name="", **more):
    tokens = random.Random(seed).choices(range(CONFIG.vocab), k=length)
    return Request(name or f"r{seed}", tokens, more.pop("sampling_params", GREEDY), max_tokens=NEW, **more)


def batch():
    return [ask(seed, 5 + 3 * seed) for seed in range(4)]


def serve(requests, spoil=None, kept=None, kind=Engine):
    """What became of `requests`, with `spoil(engine, step)` before each step. The engine stays in `kept`."""
    kept, said, failed, books = {} if kept is None else kept, {}, {}, []
    engine = kept.setdefault("engine", kind(model(), num_blocks=40, block_size=4))
    for request in requests:
        engine.add_request(request)
    for step in range(60):
        if spoil:
            spoil(engine, step)
        for event in engine.step() if engine.has_unfinished_requests else []:
            if event.request_id in failed:
                books.append(f"{event.request_id} has failed and goes on")
            if event.finish_reason == "error":
                failed[event.request_id] = event.text
            said.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        tables = [each.block_table for each in (*engine.scheduler.running, *engine.scheduler.waiting)]
        try:
            check_ref_counts(engine.block_pool, tables)
        except AssertionError as error:
            books.append(str(error))
    if engine.has_unfinished_requests or engine.block_pool.num_used_blocks:
        books.append(f"{len(engine.states)} never end, {engine.block_pool.num_used_blocks} blocks are held")
    return {"said": said, "failed": failed, "books": books, "stats": engine.stats()}


def beside(subject, requests, spoil=None, bad=()):
    """All of `requests` but those in `bad` say what they say alone, those fail, and the books are right."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):                  # the engine shows what it has caught
            got = subject(requests, spoil)
    except Exception as error:
        raise CriterionNotMet(f"the step raises {type(error).__name__}: {error}") from error
    want = _unspoiled()
    for name, tokens in want.items():
        if name[0] not in bad and got["said"].get(name) != tokens:
            raise CriterionNotMet(f"{name[0]} says {got['said'].get(name)}, alone {tokens}")
    if set(got["failed"]) != set(bad):
        raise CriterionNotMet(f"{set(got['failed'])} fail, want {set(bad)}")
    if got["books"]:
        raise CriterionNotMet(got["books"][0])


@functools.cache
def _unspoiled():
    return serve(batch())["said"]


@isolation.criterion("an exception with one request ends it alone, whole", "property")
def _(subject):
    bad = ask(9, 9, "bad", sampling_params=SamplingParams(seed=13), n=3)
    with mock.patch.object(engines, "Sampler", _Raises):
        beside(subject, [*batch()[:2], bad, *batch()[2:]], bad=["bad"])


class _Raises(Sampler):                      # the second continuation, with seed 13
    def __init__(self, how, seed, index=0):
        super().__init__(how, seed, index)
        self.raises = (seed, index) == (13, 1)

    def sample_next_token(self, *given):
        if self.raises:
            raise ArithmeticError("nobody has thought of this")
        return super().sample_next_token(*given)


@isolation.criterion("what was in a block before reaches nobody", "parity")
def _(subject):
    beside(subject, batch(), lambda engine, step: _poison(engine, engine.block_pool.free_blocks))


@isolation.criterion("what was poisoned is known no more", "parity")
def _(subject):
    kept = {}
    subject(batch(), kept=kept)
    _poison(kept["engine"], kept["engine"].block_pool.hash_to_block.values())
    first, again = (subject(batch(), kept=kept) for _ in "ab")
    if again["said"] != _unspoiled():
        raise CriterionNotMet("a prefix that was found to hold NaN changes what is said after that")
    if again["stats"]["preemptions"] > first["stats"]["preemptions"]:
        raise CriterionNotMet("a prefix that was found to hold NaN is shared once more")


@isolation.criterion("a poisoned block changes nobody's tokens", "parity")
def _(subject):
    def spoil(engine, step):
        if step == 3:
            _poison(engine, engine.states_of_request["r2"][0].sequence.block_table)
    beside(subject, batch(), spoil)


@isolation.criterion("logits that are not finite fail one request", "parity")
def _(subject):
    def spoil(engine, step):
        if step == 0:
            head = engine.model.head
            engine.model = _Spoiled(engine.model, lambda x: _nan_of(engine, "r1", head(x)))
    beside(subject, batch(), spoil, bad=["r1"])


def _poison(engine, blocks):
    engine.kv_cache.kv_memory[:, :, list(blocks)] = NAN


class _Spoiled:
    """The model with another head."""

    def __init__(self, model, head):
        self.hidden_states, self.config, self.head = model.hidden_states, model.config, head


def _nan_of(engine, name, logits):
    caught_up = [each for each in engine.last_batch if each["computed"] == each["tokens"]]
    for i, each in enumerate(caught_up):
        if each["request"] == name:
            logits[i, 5] = NAN
    return logits


class LeavesNumbers(PagedKVCache):
    def _zero_new_blocks(self, work):
        pass


class CleansValuesAlone(PagedKVCache):            # a key that is masked is NaN, too
    def _zero_new_blocks(self, work):
        keys = self.kv_memory[:, :self.num_kv_heads].clone()
        super()._zero_new_blocks(work)
        self.kv_memory[:, :self.num_kv_heads] = keys


class SpreadsExceptions(Engine):
    def _guarded(self, run, handle, *args):
        return handle(run, *args)


class GoesOnWithTwins(Engine):               # of a request that has failed
    def _guarded(self, run, handle, *args):
        try:
            return handle(run, *args)
        except ArithmeticError as error:
            return [self._fail(run, str(error))]


class KeepsTheBlocks(Engine):                # of a request that has failed
    def abort_request(self, request):
        for run in self.states_of_request.pop(request, []):
            if self.states.pop(run.sequence, None):
                self.scheduler.running.remove(run.sequence)


class TriesForEver(Engine):
    def _recompute_once(self, run):
        run.recomputed = False
        return super()._recompute_once(run)


class NeverTriesAgain(Engine):
    def _recompute_once(self, run):
        run.recomputed = True
        return super()._recompute_once(run)


class StaysKnown(Engine):
    def _recompute_once(self, run):
        with mock.patch.object(self.block_pool, "evict_cached_blocks", lambda table: None):
            return super()._recompute_once(run)


def one_for_all(rows):
    return [bool(rows.isfinite().all())] * len(rows)


ALONE, STALE, KNOWN, BLOCK, LOGITS = (c.name for c in isolation.criteria)
ENGINES = {
    "an exception with one request is everybody's": (SpreadsExceptions, ALONE),
    "a request that fails goes on with its other continuations": (GoesOnWithTwins, ALONE),
    "a request that fails keeps its blocks": (KeepsTheBlocks, ALONE),
    "what is not finite is computed again for ever": (TriesForEver, LOGITS),
    "what is not finite is never computed again": (NeverTriesAgain, BLOCK),
    "a prefix that held NaN stays known": (StaysKnown, KNOWN),
}
MUTANTS = [
    *(Mutant(name, isolation, functools.partial(serve, kind=kind), rejected_by)
      for name, (kind, rejected_by) in ENGINES.items()),
    Mutant("a block is taken as it was", isolation,
           patched(serve, "nanoinfra.serve.engine.engine:PagedKVCache", LeavesNumbers), STALE),
    Mutant("a block's keys are as they were", isolation,
           patched(serve, "nanoinfra.serve.engine.engine:PagedKVCache", CleansValuesAlone), STALE),
    Mutant("nobody looks whether logits are finite", isolation,
           patched(serve, "nanoinfra.serve.engine.engine:rows_are_finite", lambda rows: [True] * len(rows)),
           KNOWN),
    Mutant("one row that is not finite fails all", isolation,
           patched(serve, "nanoinfra.serve.engine.engine:rows_are_finite", one_for_all), LOGITS),
]
