"""Requests to the engine, their sampling parameters, and its outputs: plain values without torch."""
from dataclasses import dataclass, field
from math import log10

from nanoinfra.serve.api_errors import CONTEXT_LENGTH_EXCEEDED


@dataclass(frozen=True)
class SamplingParams:
    """How a token is sampled from the logits: penalties and bias, then temperature, top-k, top-p, min-p."""
    temperature: float = 1.0                 # below 1e-5: greedy, always the likeliest
    top_k: int = 0                           # sample among the k likeliest; 0: all
    top_p: float = 1.0                       # among the likeliest that make up this probability
    min_p: float = 0.0                       # among those at least this share as likely as the likeliest
    presence_penalty: float = 0.0            # taken off the logit of a token that was generated already
    frequency_penalty: float = 0.0           # the same, times how often it was generated
    repetition_penalty: float = 1.0          # divides the logit of a token seen before, prompt included
    logit_bias: dict[int, float] = field(default_factory=dict)          # added to logits, by token
    seed: int | None = None                  # of the generator; None: a new one each time


@dataclass(frozen=True)
class Request:
    """Continue `prompt_token_ids`, `n` times."""
    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 16                     # new ones at most; 0: only read (and score) the prompt
    n: int = 1
    stop: tuple[str, ...] = ()               # stop strings: they end it and are not shown
    ignore_eos: bool = False                 # go on past the end-of-text token
    logprobs: int | None = None              # report each token's log-probability, and of so many likeliest
    prompt_logprobs: bool = False            # report those of the prompt's tokens too (OpenAI's echo)
    cache_salt: str = ""                     # shares cached prefixes only with requests of the same salt
    stop_token_ids: tuple[int, ...] = ()     # tokens that end it, `ignore_eos` or not; they are shown
    min_tokens: int = 0                      # so many come first, and nothing but `max_tokens` ends them


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and those of the likeliest tokens in its place, the likeliest first."""
    token: int
    logprob: float | None                    # None for the prompt's first token, which nothing predicts
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RequestOutput:
    """What one step of the engine adds to one continuation of a request (a delta, not the whole text)."""
    request_id: str
    index: int = 0                           # which of the n continuations
    text: str = ""                           # new and certain: whole characters, no part of a stop string
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)               # of the same tokens, if asked for
    prompt_logprobs: list[Logprob] = field(default_factory=list)        # with the first token, if asked for
    num_cached_tokens: int = 0               # tokens of the prompt that were found in the prefix cache
    finish_reason: str | None = None         # "stop" or "length": the last output of this index; "error": the
                                             # last of the whole request, and `text` says why


class InvalidRequest(ValueError):
    """No model of this shape can answer the request: why, the parameter to blame, OpenAI's code if any."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param, self.code = param, code


def check_request(request: Request, context_length: int, vocab_size: int) -> None:
    """Raise InvalidRequest, with the numbers and the rule, for what no model of this shape can answer."""
    tokens = request.prompt_token_ids
    if not tokens:
        raise InvalidRequest("the prompt has no tokens; give at least one character", "prompt")
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        odd = max(tokens) if min(tokens) >= 0 else min(tokens)
        raise InvalidRequest(f"token {_shown(odd)} is not in the model's vocabulary of {vocab_size}; this "
                             "tokenizer is not the model's: use the one saved with it", "prompt")
    if request.max_tokens < 0:
        raise InvalidRequest(f"{_shown(request.max_tokens)} new tokens cannot be made; ask for at least 0",
                             "max_tokens")
    if (room := context_length - len(tokens)) < request.max_tokens:
        remedy = f"ask for at most {room}" if room > 0 else f"shorten it to less than {context_length} tokens"
        raise InvalidRequest(f"a prompt of {len(tokens)} tokens and {_shown(request.max_tokens)} new ones do "
                             f"not fit the model's context of {context_length}; {remedy}",
                             "max_tokens" if room > 0 else "prompt", CONTEXT_LENGTH_EXCEEDED)
    if "" in request.stop:
        raise InvalidRequest("a stop string is empty; leave it out", "stop")
    _check_ranges(request, vocab_size)
    _check_tokens(request, vocab_size)


def _check_ranges(request, vocab_size):
    params = request.sampling_params
    ranges = {"temperature": (params.temperature, 0, 100), "top_k": (params.top_k, 0, vocab_size),
              "top_p": (params.top_p, 1e-9, 1), "min_p": (params.min_p, 0, 1),
              "presence_penalty": (params.presence_penalty, -2, 2),
              "frequency_penalty": (params.frequency_penalty, -2, 2),
              "repetition_penalty": (params.repetition_penalty, 1e-9, 100), "n": (request.n, 1, 1000),
              "logprobs": (request.logprobs or 0, 0, min(vocab_size, 100)),
              "min_tokens": (request.min_tokens, 0, request.max_tokens),
              "seed": (params.seed or 0, -2 ** 63, 2 ** 63 - 1)}
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            raise InvalidRequest(f"{name} {_shown(value)} is out of range; "
                                 f"give {_shown(least)} to {_shown(most)}", name)
    if odd := [value for value in params.logit_bias.values() if not -100 <= value <= 100]:
        raise InvalidRequest(f"logit_bias {_shown(odd[0])} is out of range; give -100 to 100", "logit_bias")


def _check_tokens(request, vocab_size):
    named = {"logit_bias": request.sampling_params.logit_bias, "stop_token_ids": request.stop_token_ids}
    for name, ids in named.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidRequest(f"{name} names tokens {_shown(min(ids))} to {_shown(max(ids))}; ids are 0 "
                                 f"to {vocab_size - 1}", name)


def _shown(number):
    """A number as an error shows it: huge integers, which Python may refuse to write, by their size."""
    if isinstance(number, float):
        return f"{number:g}"
    return f"{number}" if abs(number) < 10 ** 20 else f"{'-' * (number < 0)}10^{log10(abs(number)):.0f}"
