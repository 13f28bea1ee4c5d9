"""Known-wrong samplers, refusals and stop strings: numbers that overflow, work that grows, words that fail.

`draws` takes several tokens from the same logits, `refuse` says why a request is not taken, `write` what is
shown of a text and how many tokens were decoded for it; a mutant of the library is patched in.
"""
import math
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.engine import request_and_output
from nanoinfra.serve.engine.detokenizer import IncrementalDetokenizer, StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams, check_request
from nanoinfra.serve.engine.sampler import LogitsProcessor, Sampler
from tests.serve.letters import byte_text

sampler, refusal, shown = Check("sampler"), Check("refusal"), Check("shown")


def draws(logits, how, tokens=(), n=12):
    """(`n` tokens drawn one after another, operations of torch for the last)."""
    source, tokens, said = Sampler(how, 0), list(tokens), []
    for _ in range(n):
        with Operations() as seen:
            said.append(source.sample_next_token(logits, tokens, 1))
        tokens.append(said[-1])
    return said, seen.calls


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def drawn(subject, *given):
    try:
        return subject(*given)
    except (RuntimeError, ValueError) as error:
        raise CriterionNotMet(f"{given[1]} of {given[0][:5]} raises "
                              f"{type(error).__name__}: {error}") from error


@sampler.criterion("a temperature next to nothing is greedy", "property")
def _(subject):
    for temperature in (1e-40, 5e-324, 1e-6):
        said, _ = drawn(subject, torch.tensor([1.0, 2.0, 2.0]), SamplingParams(temperature))
        if set(said) != {1}:
            raise CriterionNotMet(f"temperature {temperature} draws {said}, want the first of the likeliest "
                                  "alone")


@sampler.criterion("of finite logits a token is drawn, however large", "property")
def _(subject):
    most = torch.finfo(torch.float32).max
    ways = [SamplingParams(1e-5), SamplingParams(100), SamplingParams(1.0, repetition_penalty=1e-9),
            SamplingParams(1.0, logit_bias={0: 100.0})]
    for how in ways:
        for logits in ([most, 0.0, -most], [most] * 3, [-most] * 3):
            drawn(subject, torch.tensor(logits), how, [0, 1, 2])


@sampler.criterion("penalties are those of the text so far", "property")
def _(subject):
    for how in (SamplingParams(0, presence_penalty=0.5, frequency_penalty=0.5),
                SamplingParams(0, repetition_penalty=2.0),
                SamplingParams(0, presence_penalty=1.0, logit_bias={2: 3.0})):
        logits, tokens = torch.tensor([2.0, 1.5, 0.0, 1.0]), [0, 3]
        said, _ = drawn(subject, logits, how, tokens)
        for token in said:
            want = int(LogitsProcessor(how)(logits, tokens, 1).argmax())
            if token != want:
                raise CriterionNotMet(f"{how}: after {tokens} comes {token}, want {want}")
            tokens.append(want)


@sampler.criterion("work grows neither with the text nor with the bias", "resource")
def _(subject):
    logits = torch.zeros(3000)
    for how in (SamplingParams(0, logit_bias=dict.fromkeys(range(3000), 1.0)),
                SamplingParams(0, frequency_penalty=2.0)):
        if (calls := drawn(subject, logits, how, [1], 40)[1]) > 30:
            raise CriterionNotMet(f"{calls} operations for a token, {len(how.logit_bias)} biases, "
                                  "40 tokens of text")


def refuse(**more):
    """Why such a request is not taken; None if it is."""
    try:
        check_request(Request(**{"request_id": "r", "prompt_token_ids": [1, 2, 3]} | more), 40, 97)
    except ValueError as error:
        return str(error)


@refusal.criterion("a number of any size is refused in words", "property")
def _(subject):
    for digits in (400, 5000):
        huge = 10 ** digits
        for name, more in {"n": {"n": huge}, "logprobs": {"logprobs": huge},
                           "token": {"prompt_token_ids": [huge]},
                           "top_k": {"sampling_params": SamplingParams(top_k=huge)},
                           "new": {"max_tokens": huge},
                           "seed": {"sampling_params": SamplingParams(seed=-huge)},
                           "logit_bias": {"sampling_params": SamplingParams(logit_bias={huge: 1})}}.items():
            try:
                why = subject(**more)
            except (OverflowError, ArithmeticError) as error:
                raise CriterionNotMet(f"{name} of {digits} digits raises {type(error).__name__}") from error
            if why is None or name not in why or f"10^{digits}" not in why or len(why) > 300:
                raise CriterionNotMet(f"{name} of {digits} digits: {why}")


@refusal.criterion("what would make logits infinite is refused", "property")
def _(subject):
    for how in (SamplingParams(logit_bias={1: math.nan}), SamplingParams(logit_bias={1: math.inf}),
                SamplingParams(repetition_penalty=0.0),
                SamplingParams(math.nan), SamplingParams(logit_bias={1: 1e30})):
        if not subject(sampling_params=how):
            raise CriterionNotMet(f"{how} is taken")


def write(text, stop):
    """(what is shown, the most tokens that are held at once) of a text of byte tokens."""
    writer, said, most = StopStringDetokenizer(byte_text(), stop), "", 0
    for byte in text:
        said += writer.push_token(byte)
        most = max(most, len(writer.detokenizer.held))
    return said + writer.flush(), most


@shown.criterion("a text ends before its stop string", "property")
def _(subject):
    for text, stop in (("xaab", "aab"), ("aaab", "aab"), ("ababac", "abac"), ("xabaabab", "abab"),
                       ("ab", "ac")):
        want = text[:at] if (at := text.find(stop)) >= 0 else text
        if (got := subject(text.encode(), (stop,))[0]) != want:
            raise CriterionNotMet(f"{got!r} is shown of {text!r}, which ends before {stop!r}: want {want!r}")


@shown.criterion("bytes that are no characters are shown, a character is whole", "property")
def _(subject):
    for text in (b"\x9f" * 40, b"\xf0\x9f" * 20 + "\U0001f642".encode(), b"\x80" * 15 + "\u65e5".encode() * 3,
                 b"\x80" * 17 + "\U0001f642".encode(), b"\xff" * 14 + "\U0001f642".encode()):
        if (got := subject(text, ())[0]) != (want := text.decode(errors="replace")):
            raise CriterionNotMet(f"{text} is shown as {got!r}, want {want!r}")


@shown.criterion("work does not grow with the text", "resource")
def _(subject):
    if (most := subject(b"\x9f" * 400, ())[1]) > 40:
        raise CriterionNotMet(f"{most} tokens are decoded at once of bytes that are no characters")


def divides_first(logits, how, draws):
    best, ids = (logits.float() / how.temperature).sort(descending=True, stable=True)
    return int(ids[torch.multinomial(best.softmax(-1), 1, generator=draws)])


class Infinite(LogitsProcessor):
    def __call__(self, logits, tokens, prompt):
        logits = super().__call__(logits, tokens, prompt)
        return torch.where(logits.abs() == torch.finfo(logits.dtype).max, logits * 2, logits)


class CountsAgain(LogitsProcessor):               # all of the text at every token
    def _count_new_tokens(self, tokens, prompt):
        self.num_seen = 0
        super()._count_new_tokens(tokens, prompt)


class SeesTheFirst(LogitsProcessor):              # text alone
    def _count_new_tokens(self, tokens, prompt):
        if not self.num_seen:
            super()._count_new_tokens(tokens, prompt)


class OneByOne(LogitsProcessor):
    def _bias_tensor(self, like):
        bias = torch.zeros_like(like)
        for token, value in self.params.logit_bias.items():
            bias[token] += value
        return bias

    def __call__(self, logits, tokens, prompt):
        self.offset, self.num_seen = None, 0
        self.times.clear()
        return super().__call__(logits, tokens, prompt)


class NeverCuts(IncrementalDetokenizer):
    def _cut(self):
        return ""


class CutsCharacters(IncrementalDetokenizer):                # as if no character could be under way
    def _cut(self):
        shown = self._decode_after(self.context, self.held)[self.skip:]
        self.__init__(self.tokenizer)
        return shown


def shortest_overlap(text, stop):
    return next((n for n in range(1, len(stop)) if text.endswith(stop[:n])), 0)


def takes_any_bias(request, vocab, ranges=request_and_output._check_ranges):
    bias = dict.fromkeys(request.sampling_params.logit_bias, 0.0)
    ranges(replace(request, sampling_params=replace(request.sampling_params, logit_bias=bias)), vocab)


FLOOR, LARGE, TEXT, WORK = (c.name for c in sampler.criteria)
WORDS, RANGES = (c.name for c in refusal.criteria)
STOP, WHOLE, SHORT = (c.name for c in shown.criteria)
SAMPLER = "nanoinfra.serve.engine.sampler"
REQUESTS = "nanoinfra.serve.engine.request_and_output"
WRITER = "nanoinfra.serve.engine.detokenizer"
MUTANTS = [
    Mutant("no floor of temperature", sampler, patched(draws, f"{SAMPLER}:_GREEDY_TEMPERATURE", 1e-323),
           FLOOR),
    Mutant("divides before it subtracts", sampler, patched(draws, f"{SAMPLER}:sample_token", divides_first),
           LARGE),
    Mutant("penalties make infinities", sampler, patched(draws, f"{SAMPLER}:LogitsProcessor", Infinite),
           LARGE),
    Mutant("counts what it has counted", sampler, patched(draws, f"{SAMPLER}:LogitsProcessor", CountsAgain),
           TEXT),
    Mutant("sees no new token", sampler, patched(draws, f"{SAMPLER}:LogitsProcessor", SeesTheFirst), TEXT),
    Mutant("biases one by one", sampler, patched(draws, f"{SAMPLER}:LogitsProcessor", OneByOne), WORK),
    Mutant("writes huge integers as floats", refusal,
           patched(refuse, f"{REQUESTS}:_shown", lambda number: f"{number:g}"), WORDS),
    Mutant("writes huge integers in full", refusal, patched(refuse, f"{REQUESTS}:_shown", str), WORDS),
    Mutant("looks at no ranges", refusal,
           patched(refuse, f"{REQUESTS}:_check_ranges", lambda request, vocab: None), WORDS),
    Mutant("takes any bias", refusal, patched(refuse, f"{REQUESTS}:_check_ranges", takes_any_bias), RANGES),
    Mutant("the shortest overlap is held", shown,
           patched(write, f"{WRITER}:_overlap", shortest_overlap), STOP),
    Mutant("a stop string is sought token by token", shown,
           patched(write, f"{WRITER}:_overlap", lambda text, stop: 0), STOP),
    Mutant("bytes without characters pile up", shown,
           patched(write, f"{WRITER}:IncrementalDetokenizer", NeverCuts), SHORT),
    Mutant("a character is cut", shown, patched(write, f"{WRITER}:IncrementalDetokenizer", CutsCharacters),
           WHOLE),
]
