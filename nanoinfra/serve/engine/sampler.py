"""From logits to a token: penalties and bias, temperature, top-k, top-p, min-p, in this order.

Each continuation has a generator of its own, so its draws do not depend on what else is in the batch; it is
on the CPU, so that a seed means the same on any device. Top-k: Fan et al. 2018; top-p: Holtzman et al. 2020;
min-p: Nguyen et al. 2024; penalties: Keskar et al. 2019, and OpenAI's.
V vocabulary.
"""
import zlib
from collections import Counter
from collections.abc import Sequence
from math import isfinite

import torch

from nanoinfra.model.layers import wide
from nanoinfra.serve.engine.requests import Logprob, Sampling

GREEDY_BELOW = 1e-5                          # temperature, as vLLM's: what it would tell apart is rounding


class Sampler:
    """Draws one continuation's tokens, from `seed` alone; `index` tells those of one request apart."""

    def __init__(self, how: Sampling, seed: int | str, index: int = 0):
        self.how = how
        mixed = zlib.crc32(f"{seed} {index}".encode())                    # torch looks at 32 bits
        self.draws = torch.Generator().manual_seed(mixed)
        self.greedy = how.temperature < GREEDY_BELOW
        adjusts = how.presence or how.frequency or how.repetition != 1.0 or how.bias
        self.adjustment = Adjustment(how) if adjusts else None

    @property
    def plain(self) -> bool:
        """Does it always take the likeliest token, as it is?"""
        return self.greedy and not self.adjustment

    def share(self, other: "Sampler") -> None:
        """Of two continuations of one request, let this one make no tensor of the bias of its own."""
        if self.adjustment:
            self.adjustment.first = other.adjustment

    def draw(self, logits: torch.Tensor, tokens: Sequence[int] = (), prompt: int = 0) -> int:
        """A token id from `logits` (V,), after `tokens`, of which the first `prompt` were given.

        `tokens` are those of the last call, and more. Raises ValueError where a logit is NaN, or the largest
        is infinite.
        """
        largest = logits.max().item()                                     # NaN where one is
        if not isfinite(largest):
            raise ValueError(f"the largest logit is {largest}: no token can be drawn")
        if self.adjustment:
            logits = self.adjustment(logits, tokens, prompt)
        return int(logits.max(-1).indices) if self.greedy else sample(logits, self.how, self.draws)


def sample(logits: torch.Tensor, how: Sampling, draws: torch.Generator) -> int:
    """One token id from `logits` (V,) by temperature (at least GREEDY_BELOW), top-k, top-p and min-p."""
    best, ids = logits.cpu().to(wide(logits.dtype)).sort(descending=True, stable=True)
    best, ids = (best[:how.top_k], ids[:how.top_k]) if how.top_k > 0 else (best, ids)
    chance = ((best - best[0]) / how.temperature).softmax(-1)             # of 0 and less: nothing overflows
    before = chance.cumsum(-1) - chance                                   # what the likelier ones make up
    out = (before >= how.top_p) | (chance < how.min_p * chance[0])        # never the likeliest
    return int(ids[torch.multinomial(chance.masked_fill(out, 0.0), 1, generator=draws)])


class Adjustment:
    """What penalties and bias do to the logits of one continuation.

    `offset` (V,) is added to logits; `divisor` (V,), for repetition, divides those above 0 and multiplies the
    others. A new token changes one number of each, however long the text is. `first`, where set, is the
    adjustment of another continuation of the request, whose tensor of the bias this one takes.
    """

    def __init__(self, how: Sampling):
        self.how, self.first = how, None
        self.bias = self.offset = self.divisor = None
        self.known, self.times = 0, Counter()                             # tokens; how often each was made

    def __call__(self, logits: torch.Tensor, tokens: Sequence[int], prompt: int) -> torch.Tensor:
        """Adjusted `logits` (V,), after `tokens`: a new tensor, at least float32, without infinities.

        `tokens` are those of the last call, and more; the first `prompt` were given.
        """
        logits = logits.to(wide(logits.dtype))
        if self.offset is None:
            self.offset = self.biased(logits).clone()
            self.divisor = torch.ones_like(logits) if self.how.repetition != 1.0 else None
        self._see(tokens, prompt)
        if self.divisor is not None:
            logits = torch.where(logits > 0, logits / self.divisor, logits * self.divisor)
        most = torch.finfo(logits.dtype).max
        return (logits + self.offset).clamp_(-most, most)

    def biased(self, like: torch.Tensor) -> torch.Tensor:
        """The bias (V,) of every token, made once a request."""
        if self.first:
            return self.first.biased(like)
        if self.bias is None:
            ids, values = torch.tensor(list(self.how.bias), dtype=torch.long), list(self.how.bias.values())
            self.bias = torch.zeros_like(like)
            self.bias[ids.to(like.device)] = torch.tensor(values, dtype=like.dtype, device=like.device)
        return self.bias

    def _see(self, tokens, prompt):
        new, made = tokens[self.known:], tokens[max(self.known, prompt):]
        self.known = len(tokens)
        if self.divisor is not None:
            ids = torch.tensor(new, dtype=torch.long, device=self.divisor.device)
            self.divisor[ids] = self.how.repetition
        self.times.update(made)
        for token in set(made):
            penalty = self.how.presence + self.how.frequency * self.times[token]
            self.offset[token] = self.how.bias.get(token, 0.0) - penalty


def without(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`logits` (V,) with which none of `tokens` is drawn, unless there is no other."""
    if not tokens:
        return logits
    out = torch.zeros_like(logits, dtype=torch.bool)                      # (V,)
    out[torch.tensor(tokens, device=out.device)] = True
    return logits.masked_fill(out, torch.finfo(logits.dtype).min)


def finite(rows: torch.Tensor) -> list[bool]:
    """Of each of `rows` (N, V), are all its numbers finite? One pass where they are: a sum keeps a NaN."""
    if isfinite(rows.sum().item()):
        return [True] * len(rows)
    return rows.isfinite().all(-1).tolist()


def adjusted(logits: torch.Tensor, how: Sampling, tokens: Sequence[int], prompt: int) -> torch.Tensor:
    """`logits` (V,) less penalties, plus bias, after `tokens`, of which the first `prompt` were given."""
    return Adjustment(how)(logits, tokens, prompt)


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """For each row of `logits` (T, V) that of its token, and the `top` likeliest: as the model gave them."""
    if not tokens:
        return []
    every = logits.to(wide(logits.dtype)).log_softmax(-1)                 # (T, V)
    chosen = every.gather(1, torch.tensor(tokens, device=every.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in every.topk(top, -1))         # (T, top)
    return [Logprob(token, logprob, list(zip(id_row, row)))
            for token, logprob, id_row, row in zip(tokens, chosen, ids, values)]
