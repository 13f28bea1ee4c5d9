"""What is asked of the engine and what it answers: plain values, no torch, the same in every process."""
from dataclasses import dataclass, field
from math import log10


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
    max_tokens: int = 16                     # new ones at most; 0 with `echo`: score the prompt alone
    n: int = 1
    stop: tuple[str, ...] = ()               # texts that end it, and are not shown
    ignore_eos: bool = False                 # go on past the end-of-text token
    logprobs: int | None = None              # report each token's log-probability, and of so many likeliest
    echo: bool = False                       # report those of the prompt's tokens too
    salt: str = ""                           # shares cached prompts only with requests of the same salt


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


def check(request: Request, context: int, vocab: int) -> None:
    """Raise ValueError, with the numbers and the rule, for what no model of this shape can answer."""
    tokens = request.tokens
    if not tokens:
        raise ValueError("the prompt has no tokens; give at least one character")
    if not 0 <= min(tokens) <= max(tokens) < vocab:
        odd = max(tokens) if min(tokens) >= 0 else min(tokens)
        raise ValueError(f"token {_shown(odd)} is not in the model's vocabulary of {vocab}; this tokenizer "
                         "is not the model's: use the one saved with it")
    if request.max_tokens < (0 if request.echo else 1):
        raise ValueError(f"{_shown(request.max_tokens)} new tokens leave nothing to do; ask for at least 1")
    if (room := context - len(tokens)) < request.max_tokens:
        remedy = f"ask for at most {room}" if room > 0 else f"shorten it to less than {context} tokens"
        raise ValueError(f"a prompt of {len(tokens)} tokens and {_shown(request.max_tokens)} new ones do not "
                         f"fit the model's context of {context}; {remedy}")
    if "" in request.stop:
        raise ValueError("a stop string is empty; leave it out")
    _check_ranges(request, vocab)


def _check_ranges(request, vocab):
    how, bias = request.sampling, request.sampling.bias
    ranges = {"temperature": (how.temperature, 0, 100), "top_k": (how.top_k, 0, vocab),
              "top_p": (how.top_p, 1e-9, 1), "min_p": (how.min_p, 0, 1),
              "presence_penalty": (how.presence, -2, 2), "frequency_penalty": (how.frequency, -2, 2),
              "repetition_penalty": (how.repetition, 1e-9, 100), "n": (request.n, 1, 1000),
              "logprobs": (request.logprobs or 0, 0, min(vocab, 100)),
              "seed": (how.seed or 0, -2 ** 63, 2 ** 63 - 1)}
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise ValueError(f"{name} {_shown(value)} is out of range; "
                             f"give {_shown(least)} to {_shown(most)}")
    if bias and not 0 <= min(bias) <= max(bias) < vocab:
        raise ValueError(f"logit_bias names tokens {_shown(min(bias))} to {_shown(max(bias))}; ids are 0 to "
                         f"{vocab - 1}")
    if odd := [value for value in bias.values() if not -100 <= value <= 100]:
        raise ValueError(f"logit_bias {_shown(odd[0])} is out of range; give -100 to 100")


def _shown(number):
    """A number as an error shows it: huge integers, which Python may refuse to write, by their size."""
    if isinstance(number, float):
        return f"{number:g}"
    return f"{number}" if abs(number) < 10 ** 20 else f"{'-' * (number < 0)}10^{log10(abs(number)):.0f}"
