"""Sampling: from logits to a token by penalties, logit bias, temperature, top-k, top-p, min-p, in this order.

Each continuation has a generator of its own, so its draws do not depend on the other sequences in the batch;
the generator is on the CPU, so that a seed means the same on any device. Top-k: Fan et al. 2018; top-p
(nucleus sampling): Holtzman et al. 2020; min-p: Nguyen et al. 2024; penalties: Keskar et al. 2019, and
OpenAI's. V vocabulary.
"""
import zlib
from collections import Counter
from collections.abc import Sequence
from math import isfinite

import torch

from nanoinfra.model.layers import at_least_float32
from nanoinfra.serve.engine.request_and_output import Logprob, SamplingParams

_GREEDY_TEMPERATURE = 1e-5                   # lower ones are greedy, as in vLLM: the difference is rounding


class Sampler:
    """Samples the tokens of one continuation from `seed` alone; `index` tells those of one request apart."""

    def __init__(self, params: SamplingParams, seed: int | str, index: int = 0):
        self.params = params
        mixed = zlib.crc32(f"{seed} {index}".encode())                    # torch looks at 32 bits
        self.generator = torch.Generator().manual_seed(mixed)
        self.greedy = params.temperature < _GREEDY_TEMPERATURE
        adjusts = (params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
                   or params.logit_bias)
        self.processor = LogitsProcessor(params) if adjusts else None

    @property
    def is_plain_argmax(self) -> bool:
        """Is the next token always the likeliest one, with no penalty and no bias?"""
        return self.greedy and not self.processor

    def share_logit_bias(self, other: "Sampler") -> None:
        """Use the logit bias tensor of `other`, a continuation of the same request; make no second one."""
        if self.processor:
            self.processor.bias_owner = other.processor

    def sample_next_token(self, logits: torch.Tensor, tokens: Sequence[int] = (),
                          num_prompt_tokens: int = 0) -> int:
        """A token id from `logits` (V,), after `tokens`,
        of which the first `num_prompt_tokens` are the prompt.

        `tokens` are those of the last call, and more. Raises ValueError where a logit is NaN, or the largest
        is infinite.
        """
        largest = logits.max().item()                                     # NaN where one is
        if not isfinite(largest):
            raise ValueError(f"the largest logit is {largest}: no token can be drawn")
        if self.processor:
            logits = self.processor(logits, tokens, num_prompt_tokens)
        if self.greedy:
            return int(logits.max(-1).indices)
        return sample_token(logits, self.params, self.generator)


def sample_token(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token id from `logits` (V,) by temperature (not a greedy one), top-k, top-p and min-p."""
    best, ids = logits.cpu().to(at_least_float32(logits.dtype)).sort(descending=True, stable=True)
    best, ids = (best[:params.top_k], ids[:params.top_k]) if params.top_k > 0 else (best, ids)
    chance = ((best - best[0]) / params.temperature).softmax(-1)          # of 0 and less: nothing overflows
    before = chance.cumsum(-1) - chance                                   # probability of all likelier ones
    out = (before >= params.top_p) | (chance < params.min_p * chance[0])  # never the likeliest
    return int(ids[torch.multinomial(chance.masked_fill(out, 0.0), 1, generator=generator)])


class LogitsProcessor:
    """Applies the penalties and the logit bias of one continuation to its logits.

    `offset` (V,) is added to the logits; `divisor` (V,), for the repetition penalty, divides those above 0
    and multiplies the others. A new token changes one number of each, however long the text is. `bias_owner`,
    where set, is the processor of another continuation of the request, whose bias tensor this one uses.
    """

    def __init__(self, params: SamplingParams):
        self.params, self.bias_owner = params, None
        self.bias = self.offset = self.divisor = None
        self.num_seen, self.times = 0, Counter()             # tokens seen; how often each was generated

    def __call__(self, logits: torch.Tensor, tokens: Sequence[int], num_prompt_tokens: int) -> torch.Tensor:
        """The processed `logits` (V,), after `tokens`: a new tensor, at least float32, without infinities.

        `tokens` are those of the last call, and more; the first `num_prompt_tokens` are the prompt.
        """
        logits = logits.to(at_least_float32(logits.dtype))
        if self.offset is None:
            self.offset = self._bias_tensor(logits).clone()
            self.divisor = torch.ones_like(logits) if self.params.repetition_penalty != 1.0 else None
        self._count_new_tokens(tokens, num_prompt_tokens)
        if self.divisor is not None:
            logits = torch.where(logits > 0, logits / self.divisor, logits * self.divisor)
        most = torch.finfo(logits.dtype).max
        return (logits + self.offset).clamp_(-most, most)

    def _bias_tensor(self, like):
        """The logit bias (V,) of every token, made once a request."""
        if self.bias_owner:
            return self.bias_owner._bias_tensor(like)
        if self.bias is None:
            bias = self.params.logit_bias
            ids, values = torch.tensor(list(bias), dtype=torch.long), list(bias.values())
            self.bias = torch.zeros_like(like)
            self.bias[ids.to(like.device)] = torch.tensor(values, dtype=like.dtype, device=like.device)
        return self.bias

    def _count_new_tokens(self, tokens, num_prompt_tokens):
        params = self.params
        new, generated = tokens[self.num_seen:], tokens[max(self.num_seen, num_prompt_tokens):]
        self.num_seen = len(tokens)
        if self.divisor is not None:
            ids = torch.tensor(new, dtype=torch.long, device=self.divisor.device)
            self.divisor[ids] = params.repetition_penalty
        self.times.update(generated)
        for token in set(generated):
            penalty = params.presence_penalty + params.frequency_penalty * self.times[token]
            self.offset[token] = params.logit_bias.get(token, 0.0) - penalty


def mask_out_tokens(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`logits` (V,) from which none of `tokens` is sampled, unless there is no other."""
    if not tokens:
        return logits
    out = torch.zeros_like(logits, dtype=torch.bool)                      # (V,)
    out[torch.tensor(tokens, device=out.device)] = True
    return logits.masked_fill(out, torch.finfo(logits.dtype).min)


def rows_are_finite(rows: torch.Tensor) -> list[bool]:
    """Says of each of `rows` (N, V) whether all its numbers are finite. One pass if so: a sum keeps a NaN."""
    if isfinite(rows.sum().item()):
        return [True] * len(rows)
    return rows.isfinite().all(-1).tolist()


def gather_logprobs(logits: torch.Tensor, tokens: Sequence[int], num_logprobs: int) -> list[Logprob]:
    """For each row of `logits` (T, V) the log-probability of its token,
    and the `num_logprobs` likeliest tokens.

    They are the model's own, before penalties, temperature and top-k.
    """
    if not tokens:
        return []
    every = logits.to(at_least_float32(logits.dtype)).log_softmax(-1)                 # (T, V)
    chosen = every.gather(1, torch.tensor(tokens, device=every.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in every.topk(num_logprobs, -1))            # (T, num_logprobs)
    return [Logprob(token, logprob, list(zip(id_row, row)))
            for token, logprob, id_row, row in zip(tokens, chosen, ids, values)]
