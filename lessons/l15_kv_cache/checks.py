"""Checks of lesson 15: attention with a KV cache, and a generation loop that reads each token once."""
import functools

import torch

from lessons.l15_kv_cache import cases
from lessons.l15_kv_cache.exercise_cache import ExerciseKVCache
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.lab.instruments.tensor_read_bytes import TensorReadBytes
from nanoinfra.model.attention_cores import naive_attention

PREDICTIONS = {**{f"L15.kv_{kind}": "B" for kind in ("mha", "gqa", "mqa")},
               **{f"L15.flops_{what}": "FLOPs" for what in ("prefill", "decode", "again")},
               **{f"L15.intensity_{phase}": "FLOPs/B" for phase in ("prefill", "decode")},
               "L15.even": "sequences",
               **{f"L15.{what}": "tokens/s" for what in ("prefill_1", "decode_1", "decode_8")}}
attend = Check("attend")
generate = Check("generate")
CHECKS = (attend, generate)
CHUNKS = [(5, 1, 1, 4), (1, 1, 1), (3, 4), (9,)]                     # tokens a call, one after another
PROMPTS = [(2, 7, 5), (1, 4, 1), (3, 1, 6)]                          # sequences, tokens, new tokens


@attend.criterion("keeps k and v behind what is there", "property")
def _(subject):
    for heads, kv in cases.HEADS:
        for before, T in ((0, 3), (4, 1), (4, 3)):
            memory, q, k, v = cases.inputs(heads, kv, before, T)
            old, where = memory.clone(), f"after a call of {T} with {before} kept, {heads} heads on {kv}"
            subject(memory, before, q, k, v)
            for i, (name, new) in enumerate((("keys", k), ("values", v))):
                causes = {"keys and values changed places?": (v, k)[i]}
                got = memory[i, :, :, before:before + T]
                if got.isnan().all():
                    raise CriterionNotMet(f"{where}, memory[{i}][:, :, {before}:{before + T}] is as it was: "
                                          "write k and v into the memory itself")
                assert_same_tensor(f"memory[{i}], the new {name}, {where}", got, new, 0, likely_causes=causes)
            kept = old[..., :before, :], memory[..., :before, :]
            if not torch.equal(*kept) or not memory[..., before + T:, :].isnan().all():
                raise CriterionNotMet(f"{where}, the memory of other tokens has changed: write {before} to "
                                      f"{before + T - 1} and nothing else")


@attend.criterion("the first token sees itself", "property")
def _(subject):
    for heads, kv in cases.HEADS:
        memory, q, k, v = cases.inputs(heads, kv, 0, 1)
        G = heads // kv
        causes = {f"query head h reads KV head h // {G}, not h % {kv}": v[:, [h % kv for h in range(heads)]]}
        y, zeros = subject(memory, 0, q, k, v), torch.zeros_like(memory)
        if isinstance(y, torch.Tensor) and y.isnan().any() and subject(zeros, 0, q, k, v).isnan().any():
            raise CriterionNotMet(f"y of the first token, {heads} heads on {kv}, is not a number, whatever "
                                  "the memory: it sees no key: is its own masked? Query t sees key t")
        assert_same_tensor(f"y of the first token, {heads} heads on {kv}: its own value", y,
                           v.repeat_interleave(G, 1), 0, rtol=1e-12, likely_causes=causes)


@attend.criterion("nobody sees a later token", "property")
def _(subject):
    for before, T in ((0, 4), (3, 4)):
        memory, q, k, v = cases.inputs(4, 2, before, T)
        first = subject(memory.clone(), before, q, k, v)
        k[:, :, -1] += 1
        v[:, :, -1] += 1
        moved = (subject(memory, before, q, k, v) - first).abs().amax((0, 1, 3)) > 1e-12      # (T,)
        if moved[:-1].any():
            raise CriterionNotMet(f"with {before} tokens kept and {T} new, another token {before + T - 1} "
                                  f"changes what token {before + moved.tolist().index(True)} makes: it sees "
                                  f"a later one (query t sees keys 0 to {before} + t), or rows of G and T "
                                  "are mixed up")


@attend.criterion("the same as all at once, to 1e-10", "parity")
def _(subject):
    for heads, kv in cases.HEADS:
        for chunks in CHUNKS:
            total = sum(chunks)
            memory, q, k, v = cases.inputs(heads, kv, 0, total)
            want, before = naive_attention(q, k, v), 0
            for T in chunks:
                now = slice(before, before + T)
                got = subject(memory, before, *(x[:, :, now] for x in (q, k, v)))
                assert_same_tensor(f"y of tokens {before} to {before + T - 1}, {heads} heads on {kv}", got,
                                   want[:, :, now],
                                   0, rtol=1e-10, likely_causes=cases.slips(q, k, v, before, T))
                before += T


@attend.criterion("a decoder in chunks is the full forward", "parity")
@torch.no_grad()
def _(subject):
    for heads, kv in cases.HEADS:
        model, tokens = cases.model(heads, kv), cases.tokens(2, 11)
        want = model.hidden_states(tokens)
        cache = ExerciseKVCache(subject, model.config, 2, 11, torch.float64)
        for T in CHUNKS[0]:
            now = slice(cache.length, cache.length + T)
            got = model.hidden_states(tokens[:, now], torch.arange(now.start, now.stop), cache)
            assert_same_tensor(f"hidden of tokens {now.start} to {now.stop - 1}, {heads} heads on {kv}", got,
                               want[:, now], 0, rtol=1e-10)
            cache.length += T


@attend.criterion("copies no keys", "resource")
def _(subject):
    for heads, kv in cases.HEADS:
        memory, q, k, v = cases.inputs(heads, kv, 40, 1, K=64)
        with LiveTensorBytes([memory], mark_operators=True) as storages:
            subject(memory, 40, q, k, v)
        made, keys = storages.peak_bytes - memory.nbytes, memory[0, :, :, :41].nbytes
        if made >= keys:
            raise CriterionNotMet(f"one token that sees 41, {heads} heads on {kv}: makes {made:,} bytes at "
                                  f"once, and all keys have {keys:,}: are they copied for each query head, "
                                  f"or put together anew? Slice memory, and let the {heads // kv} queries of "
                                  "a KV head stand side by side")


@attend.criterion("reads what is kept once", "resource")
def _(subject):
    for heads, kv in cases.HEADS:
        memory, q, k, v = cases.inputs(heads, kv, 40, 1, K=64)
        with TensorReadBytes(memory=[memory]) as traffic:
            subject(memory, 40, q, k, v)
        got, want = traffic.read_bytes["memory"], memory[..., :41, :].nbytes
        if got != want:
            why = "all of the memory, filled or not?" if got == memory.nbytes else "keys once, values once"
            raise CriterionNotMet(f"one token that sees 41, {heads} heads on {kv}: reads {got:,} bytes of "
                                  f"the memory, want {want:,}: {why}")


@generate.criterion("n new tokens for each sequence", "property")
def _(subject):
    for B, P, n in PROMPTS:
        got = _run(subject, B, P, n)["made"]
        if not isinstance(got, torch.Tensor) or got.dtype != torch.long:
            raise CriterionNotMet(f"got {got!r:.60}, want a tensor of tokens ({B}, {n}): no return?")
        if got.shape != (B, n):
            why = ": with the prompt?" if got.shape[1:] == (P + n,) else ""
            raise CriterionNotMet(f"{B} sequences of {P} tokens and {n} new: shape {tuple(got.shape)}, want "
                                  f"({B}, {n}){why}")


@generate.criterion("each token goes in once, at its place", "property")
def _(subject):
    for B, P, n in PROMPTS:
        run = _run(subject, B, P, n)
        got = [place for _, places, _ in run["calls"] for place in places]
        if got != [*range(P + n - 1)]:
            calls = ", ".join(str(places) for _, places, _ in run["calls"])
            raise CriterionNotMet(f"a prompt of {P} and {n} new: the model is called with places {calls}, "
                                  f"want {[*range(P)]} and then one a call, up to {P + n - 2}: "
                                  f"{_why_places(run, n)}")
        for i, (_, places, length) in enumerate(run["calls"]):
            if length != places[0]:
                raise CriterionNotMet(f"call {i} runs token {places[0]} when cache.length says {length}: add "
                                      "a call's tokens to cache.length, after it")
        fed = torch.cat([tokens for tokens, _, _ in run["calls"]], 1)
        want = torch.cat([cases.tokens(B, P), run["made"][:, :-1]], 1)
        if not torch.equal(fed, want):
            b, i = (fed != want).nonzero()[0].tolist()
            source = "the prompt" if i < P else "what the call before has made, of each sequence"
            raise CriterionNotMet(f"sequence {b}, token {i} goes in as {fed[b, i]}, want {want[b, i]}: "
                                  f"{source}")


@generate.criterion("what the full forward says", "parity")
def _(subject):
    for B, P, n in PROMPTS:
        got, want = _run(subject, B, P, n)["made"], cases.greedy(B, P, n)
        if not torch.equal(got, want):
            b, i = (got != want).nonzero()[0].tolist()
            raise CriterionNotMet(f"{B} sequences of {P} tokens: sequence {b}, new token {i} is {got[b, i]}, "
                                  f"want {want[b, i]}: the likeliest by the logits of the last row of its "
                                  "sequence")


@generate.criterion("prefill once, then a token a call", "resource")
def _(subject):
    for B, P, n in PROMPTS:
        got, want = [len(places) for _, places, _ in _run(subject, B, P, n)["calls"]], [P] + [1] * (n - 1)
        if got != want:
            raise CriterionNotMet(f"a prompt of {P} and {n} new: calls of {got} tokens, want {want}: a call "
                                  "reads all weights, so the prompt goes in one")


@generate.criterion("the head reads one row a sequence", "resource")
def _(subject):
    for B, P, n in PROMPTS:
        got = _run(subject, B, P, n)["rows"]
        if got != [B] * n:
            raise CriterionNotMet(f"{B} sequences of {P} tokens and {n} new: the head reads {got} rows, want "
                                  f"{[B] * n}: the next token needs the last row alone, hidden[:, -1]")


@generate.criterion("memory for what is kept", "resource")
def _(subject):
    for B, P, n in PROMPTS:
        got = _run(subject, B, P, n)["asked"]
        if got != [P + n - 1]:
            raise CriterionNotMet(f"a prompt of {P} and {n} new: asks for caches of {got} tokens, want one "
                                  f"of {P + n - 1}: the last token goes in no more")


def _why_places(run, n):
    firsts = [places[0] for _, places, _ in run["calls"]]
    if len(firsts) > 1 and not any(firsts):
        again = len(run["calls"][-1][1]) > 1
        return "all tokens again? The cache has them" if again else "a new one is at cache.length, not at 0"
    if len(firsts) == n + 1:
        return "the last token has gone in, and nobody asks what follows"
    return "a token's place is the number of tokens before it"


@functools.lru_cache(maxsize=8)
def _run(subject, B, P, n):
    """What `subject` made and how, kept for the next criterion."""
    return cases.run(subject, B, P, n)
