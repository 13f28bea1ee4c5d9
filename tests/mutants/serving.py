"""Known-wrong servers: stale pages, blocks freed twice, hits too long, one seed for all, stops that leak.

`serve` runs rounds of requests through the real engine; a mutant of the library is patched in while it runs.
"""
import functools
import math
import random

import torch
import torch.nn.functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.engine.sampler import Sampler
from nanoinfra.serve.engine.scheduler import Scheduler
from nanoinfra.serve.generate_with_kv_cache import generate
from tests.serve.letters import letters
from tests.serve.ref_counts import check_ref_counts

CONFIG = ModelConfig(vocab=97, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=40, context=64)
GREEDY, NEW, SEEDS = SamplingParams(temperature=0), 8, (0, 10, 20)
serving = Check("serving")
torch.set_num_threads(1)                     # in products as small as these, a second one is only waited for


@functools.cache
def model(seed=0):
    """float64; weights so wide that logits differ."""
    net, draws = Decoder(CONFIG), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-0.4 if parameter.dim() > 1 else 0.5, 0.4 if parameter.dim() > 1 else 1.5,
                               generator=draws)
    return net.double()


def prompt(seed, n):
    return random.Random(seed).choices(range(CONFIG.vocab), k=n)


def alone(tokens, new=NEW, weights=0, **how):
    """What a request says that nobody else is beside."""
    return list(generate(model(weights), tokens, new, **how))


def ask(name, tokens, new=NEW, sampling_params=GREEDY, **more):
    return Request(name, tokens, sampling_params, max_tokens=new, **more)


def serve(rounds, text=None, renew=False, kind=Engine, **how):
    """Each of `rounds`, requests that come together, runs to its end on one engine: what became of them.

    tokens {(request, index): ids}, shown {the same: text}, and what the books of the blocks did not agree on.
    `renew`: new weights between the rounds.
    """
    engine = kind(model(0), text, **{"num_blocks": 40, "block_size": 4} | how)
    tokens, shown, books = {}, {}, []
    for i, requests in enumerate(rounds):
        if renew and i:
            engine.model = model(i)
            engine.reset_prefix_cache()
        for request in requests:
            engine.add_request(request)
        while engine.has_unfinished_requests:
            for event in engine.step():
                tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
                shown[event.request_id, event.index] = shown.get((event.request_id, event.index),
                                                                 "") + event.text
            tables = [each.block_table for each in (*engine.scheduler.running, *engine.scheduler.waiting)]
            try:
                check_ref_counts(engine.block_pool, tables)
            except AssertionError as error:
                books.append(str(error))
        if engine.block_pool.num_used_blocks:
            books.append(f"{engine.block_pool.num_used_blocks} blocks are held, and nobody is here")
    return {"tokens": tokens, "shown": shown, "books": books}


@serving.criterion("a stop string is not shown, nor a part of it", "property")
def _(subject):
    tokens = prompt(5, 5)
    text = letters().decode(alone(tokens, 12))
    stops = {"none": (), "at once": (text[0],), "of one": (text[4],), "of two": (text[3:5],),
             "of four": (text[5:9],), "of two that end alike": (text[3] + "x", text[3:6])}
    shown = {name: subject([[ask("r", tokens, 12, stop=stop)]], letters())["shown"]["r", 0]
             for name, stop in stops.items()}
    for name, stop in stops.items():
        whole = shown["none"]
        want = whole[:min((at for each in stop if (at := whole.find(each)) >= 0), default=None)]
        if shown[name] != want:
            raise CriterionNotMet(f"stop {name}: {shown[name]!r} is shown of {whole!r}, want {want!r}")


@serving.criterion("every block is given back once, by each that held it", "property")
def _(subject):
    tokens = prompt(7, 12)
    sharing = [ask(name, [*tokens, i], new) for i, (name, new) in enumerate([("a", 2), ("b", 9), ("c", 5)])]
    for rounds in ([[ask("first", tokens)], sharing], [[ask("r", tokens, n=3), ask("s", prompt(8, 5), 3)]]):
        if books := subject(rounds, num_blocks=14)["books"]:
            raise CriterionNotMet(f"{books[0]}: given back for somebody else, or twice, or not at all?")


@serving.criterion("requests side by side say what each says alone", "parity")
def _(subject):
    for seed in SEEDS:
        _says(subject, [{f"r{i}": prompt(seed + i, 3 + 2 * i) for i in range(6)}])


@serving.criterion("a chunk sees no later token, and all earlier ones", "parity")
def _(subject):
    for seed in SEEDS:
        _says(subject, [{f"r{i}": prompt(seed + i, 13 + i) for i in range(3)}], max_num_batched_tokens=5)


@serving.criterion("a block that is taken again is not what it was", "parity")
def _(subject):
    for seed in SEEDS:
        first, other = prompt(seed, 9), prompt(seed + 1, 17)
        _says(subject, [{"first": first}, {"other": other}, {"first again": first}], num_blocks=6)


@serving.criterion("new weights read nothing that the old ones wrote", "parity")
def _(subject):
    for seed in SEEDS:
        _says(subject, [{"old": prompt(seed, 9)}, {"new": prompt(seed, 9)}], renew=True)


@serving.criterion("a prompt that is known says what it says alone", "parity")
def _(subject):
    for seed in SEEDS:
        tokens, other = prompt(seed, 12), prompt(seed + 1, 6)
        _says(subject, [{"first": tokens}, {"whole": tokens, "longer": [*tokens, 1, 2], "other": other}])
        _says(subject, [{"first": tokens}, {"from its middle": [*tokens[4:], 3]}])


@serving.criterion("forks go on from their prompt", "parity")
def _(subject):
    for seed in SEEDS:
        _says(subject, [{"r": prompt(seed, 10)}], n=3)


@serving.criterion("each draws from a seed of its own", "parity")
def _(subject):
    how, asked = {"temperature": 1.3, "seed": 11}, {f"r{i}": prompt(i, 4 + i) for i in range(4)}
    drawn = SamplingParams(**how)
    got = subject([[ask(name, tokens, sampling_params=drawn) for name, tokens in asked.items()]])["tokens"]
    for name, tokens in asked.items():
        if got[name, 0] != (want := alone(tokens, **how)):
            raise CriterionNotMet(f"{name}, seed 11, beside three others draws {got[name, 0]}, alone {want}")
    forks = subject([[ask("r", asked["r0"], sampling_params=drawn, n=3)]])["tokens"]
    if len({tuple(each) for each in forks.values()}) < 3:
        raise CriterionNotMet(f"n = 3 draws {list(forks.values())}: want three that differ")


def _says(subject, rounds, n=1, renew=False, **how):
    """All in `rounds`, {name: its prompt} each, say n times what they say alone."""
    asked = [[ask(name, tokens, n=n) for name, tokens in each.items()] for each in rounds]
    got = subject(asked, renew=renew, **how)["tokens"]
    for i, each in enumerate(rounds):
        for name, tokens in each.items():
            want = alone(tokens, weights=i if renew else 0)
            for index in range(n):
                if got[name, index] != want:
                    raise CriterionNotMet(f"{name} ({index} of {n}, round {i}) says {got[name, index]}, "
                                          f"alone {want}")


class NeverForgets(BlockPool):                  # the contents of a block that is taken again stay known
    def allocate(self):
        block, _ = self.free_blocks.popitem(last=False)
        self.ref_counts[block] = 1
        return block


def of_its_own_tokens(keys, tokens, size):
    """As if a block's keys and values were made of its own tokens alone."""
    begins = range(size * (len(keys) - 1), len(tokens) - size + 1, size)
    keys += [repr(tokens[begin:begin + size]).encode() for begin in begins]


class HitsTheWholePrompt(Scheduler):         # nothing is left to compute, and nothing has logits
    def _usable_hashes(self, sequence):
        return sequence.block_hashes[1:1 + len(sequence.tokens) // self.block_pool.block_size]


class FreesForAll(BlockPool):                   # for whoever still reads it, too
    def free(self, table):
        for block in reversed(table):
            self.ref_counts[block] = max(0, self.ref_counts[block] - 1)
            self.free_blocks[block] = None


class GivesBackTwice(BlockPool):
    def free(self, table):
        super().free(table)
        super().free([block for block in table if self.ref_counts[block]])


class KeepsTheLast(BlockPool):
    def free(self, table):
        super().free(table[:-1])


class OneForAll(Sampler):
    generator = torch.Generator().manual_seed(11)

    def __init__(self, how, seed, index=0):
        super().__init__(how, seed, index)
        del self.generator                       # the class's


class SameForAllForks(Sampler):
    def __init__(self, how, seed, index=0):
        super().__init__(how, seed, 0)


class HoldsNothing(StopStringDetokenizer):
    def _show(self, new, last):
        return super()._show(new, True)


class ShowsTheStop(StopStringDetokenizer):
    def _show(self, new, last):
        before, whole = self.stopped, self.held + new
        text = super()._show(new, last)
        stop = next((stop for stop in self.stop_strings if whole[len(text):].startswith(stop)), "")
        return text + (stop if self.stopped and not before else "")


class ShowsWhatItHeld(StopStringDetokenizer):               # where one has come, too
    def push_token(self, token):
        text = super().push_token(token)
        if self.stopped:
            self.held = self.stop_strings[0][:1]
        return text

    def flush(self):
        return self.held


class CopiesNothing(PagedKVCache):                # a block that others read is written to after all
    def prepare_inputs(self, plan):
        plan.blocks_to_copy.clear()
        return super().prepare_inputs(plan)


class BeginsEachChunkAt0(PagedKVCache):
    def prepare_inputs(self, plan):
        work, tokens, places = super().prepare_inputs(plan)
        at = 0
        for _, first, count in work:
            if count > 1:
                places[0, at:at + count] -= first
            at += count
        return work, tokens, places


class ReadsPastTheEnd(PagedKVCache):              # what was in a block before
    def _build_decode_metadata(self, ones):
        index, bias, places = super()._build_decode_metadata(ones)
        return index, bias.masked_fill(bias == -math.inf, 0.0), places


class ForgetsToForget(Engine):
    def reset_prefix_cache(self):
        pass


def looks_ahead(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2], enable_gqa=True)


def aligns_at_the_start(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


STOP, BOOKS, BESIDE, CHUNK, STALE, NEWER, KNOWN, FORKS, SEED = (c.name for c in serving.criteria)
VARIANTS = {
    "a page is still known by what it held": (NeverForgets, STALE),
    "a page is read past its sequence's end": (ReadsPastTheEnd, BESIDE),
    "a hit covers the full prompt": (HitsTheWholePrompt, KNOWN),
    "a shared block is freed with its first holder": (FreesForAll, BOOKS),
    "a shared block is given back twice": (GivesBackTwice, BOOKS),
    "a last block is never given back": (KeepsTheLast, BOOKS),
    "one seed for the whole batch": (OneForAll, SEED),
    "one seed for all forks": (SameForAllForks, SEED),
    "the beginning of a stop string leaks": (HoldsNothing, STOP),
    "a stop string is shown": (ShowsTheStop, STOP),
    "what was held is shown after a stop": (ShowsWhatItHeld, STOP),
    "a fork writes where others read": (CopiesNothing, FORKS),
    "each chunk begins at place 0": (BeginsEachChunkAt0, CHUNK),
}
ENGINES = "nanoinfra.serve.engine.engine"
MUTANTS = [
    *(Mutant(name, serving, patched(serve, f"{ENGINES}:{kind.__base__.__name__}", kind), rejected_by)
      for name, (kind, rejected_by) in VARIANTS.items()),
    Mutant("an acausal mask in a chunk", serving,
           patched(serve, "nanoinfra.serve.engine.paged_attention:sdpa_attention", looks_ahead), CHUNK),
    Mutant("a chunk's mask begins at key 0", serving,
           patched(serve, "nanoinfra.serve.engine.paged_attention:sdpa_attention", aligns_at_the_start),
           CHUNK),
    Mutant("a page is known by its own tokens alone", serving,
           patched(serve, "nanoinfra.serve.engine.scheduler:extend_block_hashes", of_its_own_tokens), KNOWN),
    Mutant("old weights' keys stay known", serving, functools.partial(serve, kind=ForgetsToForget), NEWER),
]
