"""From logits to a token: penalties and bias, temperature, top-k, top-p, min-p, in this order.

Each continuation has a generator of its own, so its draws do not depend on what else is in the batch; it is
on the CPU, so that a seed means the same on any device. Top-k: Fan et al. 2018; top-p: Holtzman et al. 2020;
min-p: Nguyen et al. 2024; penalties: Keskar et al. 2019, and OpenAI's.
V vocabulary.
"""
import zlib
from collections import Counter
from collections.abc import Sequence

import torch

from nanoinfra.model.layers import wide
from nanoinfra.serve.requests import Logprob, Sampling


class Sampler:
    """Draws one continuation's tokens, from `seed` alone; `index` tells those of one request apart."""

    def __init__(self, how: Sampling, seed: int | str, index: int = 0):
        self.how = how
        mixed = zlib.crc32(f"{seed} {index}".encode())                    # torch looks at 32 bits
        self.draws = torch.Generator().manual_seed(mixed)
        self.adjusts = bool(how.presence or how.frequency or how.repetition != 1.0 or how.bias)

    @property
    def plain(self) -> bool:
        """Does it always take the likeliest token, as it is?"""
        return self.how.temperature == 0 and not self.adjusts

    def draw(self, logits: torch.Tensor, tokens: Sequence[int] = (), prompt: int = 0) -> int:
        """A token id from `logits` (V,), after `tokens`, of which the first `prompt` were given."""
        if self.adjusts:
            logits = adjusted(logits, self.how, tokens, prompt)
        if self.how.temperature == 0:
            return int(logits.argmax())
        return sample(logits, self.how, self.draws)


def sample(logits: torch.Tensor, how: Sampling, draws: torch.Generator) -> int:
    """One token id from `logits` (V,) by temperature (not 0), top-k, top-p and min-p."""
    logits = logits.cpu().to(wide(logits.dtype)) / how.temperature
    best, ids = logits.sort(descending=True, stable=True)
    best, ids = (best[:how.top_k], ids[:how.top_k]) if how.top_k > 0 else (best, ids)
    chance = best.softmax(-1)
    before = chance.cumsum(-1) - chance                                   # what the likelier ones make up
    out = (before >= how.top_p) | (chance < how.min_p * chance[0])        # never the likeliest
    return int(ids[torch.multinomial(chance.masked_fill(out, 0.0), 1, generator=draws)])


def adjusted(logits: torch.Tensor, how: Sampling, tokens: Sequence[int], prompt: int) -> torch.Tensor:
    """`logits` (V,) less penalties, plus bias; a new tensor, at least float32."""
    logits = logits.to(wide(logits.dtype), copy=True)
    if how.repetition != 1.0:
        seen = torch.tensor(sorted(set(tokens)), device=logits.device)
        value = logits[seen]
        logits[seen] = torch.where(value > 0, value / how.repetition, value * how.repetition)
    if how.presence or how.frequency:
        made = Counter(tokens[prompt:])
        ids = torch.tensor(list(made), dtype=torch.long, device=logits.device)
        times = torch.tensor(list(made.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= how.presence + how.frequency * times
    for token, bias in how.bias.items():
        logits[token] += bias
    return logits


def logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Logprob]:
    """For each row of `logits` (T, V) that of its token, and the `top` likeliest: as the model gave them."""
    if not tokens:
        return []
    every = logits.to(wide(logits.dtype)).log_softmax(-1)                 # (T, V)
    chosen = every.gather(1, torch.tensor(tokens, device=every.device)[:, None])[:, 0].tolist()
    values, ids = (part.tolist() for part in every.topk(top, -1))         # (T, top)
    return [Logprob(token, logprob, list(zip(id_row, row)))
            for token, logprob, id_row, row in zip(tokens, chosen, ids, values)]
