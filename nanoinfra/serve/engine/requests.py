"""What is asked of the engine and what it answers: plain values, no torch, the same in every process."""
from dataclasses import dataclass, field
from math import log10

from nanoinfra.serve.server.errors import CONTEXT_LENGTH_EXCEEDED


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits: penalties and bias, then temperature, top-k, top-p, min-p."""
    temperature: float = 1.0                 # below 1e-5: always the likeliest
    top_k: int = 0                           # draw among the k likeliest; 0: all
    top_p: float = 1.0                       # among the likeliest that make up this probability
    min_p: float = 0.0                       # among those at least this share as likely as the likeliest
    presence: float = 0.0                    # taken off the logit of a token that was generated already
    frequency: float = 0.0                   # the same, times how often
    repetition: float = 1.0                  # divides the logit of a token seen before, prompt included
    bias: dict[int, float] = field(default_factory=dict)                # added to logits, by token
    seed: int | None = None                  # of the draws; None: a new one each time


@dataclass(frozen=True)
class Request:
    """Continue `tokens`, `n` times."""
    id: str
    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 16                     # new ones at most; 0: read the prompt alone, score it if `echo`
    n: int = 1
    stop: tuple[str, ...] = ()               # texts that end it, and are not shown
    ignore_eos: bool = False                 # go on past the end-of-text token
    logprobs: int | None = None              # report each token's log-probability, and of so many likeliest
    echo: bool = False                       # report those of the prompt's tokens too
    salt: str = ""                           # shares cached prompts only with requests of the same salt
    stop_token_ids: tuple[int, ...] = ()     # tokens that end it, `ignore_eos` or not; they are shown
    min_tokens: int = 0                      # so many come first, and nothing but `max_tokens` ends them


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and those of the likeliest in its place, the likeliest first."""
    token: int
    logprob: float | None                    # None for the prompt's first token, which nothing predicts
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """News of one continuation of a request: what came since the last."""
    request: str
    index: int = 0                           # which of n
    text: str = ""                           # new and certain: whole characters, no part of a stop string
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)               # of the same tokens, if asked for
    prompt: list[Logprob] = field(default_factory=list)                 # with the first token, if echo
    cached: int = 0                          # tokens of the prompt that were known already
    finish: str | None = None                # "stop" or "length": the last event of this index; "error": the
                                             # last of the request, all of it, and `text` says why


class Unanswerable(ValueError):
    """No model of this shape can answer: why, which parameter is to blame, OpenAI's code if there is one."""

    def __init__(self, why: str, param: str | None = None, code: str | None = None):
        super().__init__(why)
        self.param, self.code = param, code


def check(request: Request, context: int, vocab: int) -> None:
    """Raise Unanswerable, with the numbers and the rule, for what no model of this shape can answer."""
    tokens = request.tokens
    if not tokens:
        raise Unanswerable("the prompt has no tokens; give at least one character", "prompt")
    if not 0 <= min(tokens) <= max(tokens) < vocab:
        odd = max(tokens) if min(tokens) >= 0 else min(tokens)
        raise Unanswerable(f"token {_shown(odd)} is not in the model's vocabulary of {vocab}; this tokenizer "
                           "is not the model's: use the one saved with it", "prompt")
    if request.max_tokens < 0:
        raise Unanswerable(f"{_shown(request.max_tokens)} new tokens cannot be made; ask for at least 0",
                           "max_tokens")
    if (room := context - len(tokens)) < request.max_tokens:
        remedy = f"ask for at most {room}" if room > 0 else f"shorten it to less than {context} tokens"
        raise Unanswerable(f"a prompt of {len(tokens)} tokens and {_shown(request.max_tokens)} new ones do "
                           f"not fit the model's context of {context}; {remedy}",
                           "max_tokens" if room > 0 else "prompt", CONTEXT_LENGTH_EXCEEDED)
    if "" in request.stop:
        raise Unanswerable("a stop string is empty; leave it out", "stop")
    _check_ranges(request, vocab)
    _check_tokens(request, vocab)


def _check_ranges(request, vocab):
    how = request.sampling
    ranges = {"temperature": (how.temperature, 0, 100), "top_k": (how.top_k, 0, vocab),
              "top_p": (how.top_p, 1e-9, 1), "min_p": (how.min_p, 0, 1),
              "presence_penalty": (how.presence, -2, 2), "frequency_penalty": (how.frequency, -2, 2),
              "repetition_penalty": (how.repetition, 1e-9, 100), "n": (request.n, 1, 1000),
              "logprobs": (request.logprobs or 0, 0, min(vocab, 100)),
              "min_tokens": (request.min_tokens, 0, request.max_tokens),
              "seed": (how.seed or 0, -2 ** 63, 2 ** 63 - 1)}
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise Unanswerable(f"{name} {_shown(value)} is out of range; "
                               f"give {_shown(least)} to {_shown(most)}", name)
    if odd := [value for value in how.bias.values() if not -100 <= value <= 100]:
        raise Unanswerable(f"logit_bias {_shown(odd[0])} is out of range; give -100 to 100", "logit_bias")


def _check_tokens(request, vocab):
    for name, ids in {"logit_bias": request.sampling.bias, "stop_token_ids": request.stop_token_ids}.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            raise Unanswerable(f"{name} names tokens {_shown(min(ids))} to {_shown(max(ids))}; ids are 0 to "
                               f"{vocab - 1}", name)


def _shown(number):
    """A number as an error shows it: huge integers, which Python may refuse to write, by their size."""
    if isinstance(number, float):
        return f"{number:g}"
    return f"{number}" if abs(number) < 10 ** 20 else f"{'-' * (number < 0)}10^{log10(abs(number)):.0f}"
