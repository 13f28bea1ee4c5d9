"""Test cases of lesson 15: awkward numbers of heads, a memory of NaN, and a decoder that records calls."""
import functools
from unittest import mock

import torch

from nanoinfra.config import ModelConfig
from nanoinfra.model.attention_cores import naive_attention
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.serve.generate_with_kv_cache import KVCache

HEADS = [(4, 2), (3, 3), (6, 1)]             # query heads, KV heads: grouped, one each, one for all
SPARE = 3                                    # tokens of memory that nobody fills


def inputs(heads: int, kv: int, before: int, T: int, K: int = 6) -> tuple[torch.Tensor, ...]:
    """(memory (2, 2, kv, before + T + SPARE, K) with `before` tokens there, q, k, v of T tokens), float64."""
    dice = torch.Generator().manual_seed(heads + 10 * before + T)
    memory = torch.full((2, 2, kv, before + T + SPARE, K), torch.nan, dtype=torch.float64)
    memory[..., :before, :] = torch.randn(2, 2, kv, before, K, generator=dice, dtype=torch.float64)
    q, k, v = (torch.randn(2, n, T, K, generator=dice, dtype=torch.float64) for n in (heads, kv, kv))
    return memory, q, k, v


def slips(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, T: int) -> dict[str, torch.Tensor]:
    """What usual mistakes make of tokens `before` to `before + T` (all of q, k, v are given): {cause: y}."""
    S, K, H, KV = before + T, q.shape[-1], q.shape[1], k.shape[1]
    dealt = [g * KV + kv for kv in range(KV) for g in range(H // KV)]
    mine, (keys, values) = q[:, :, before:S], (x[:, :, :S] for x in (k, v))
    return {"the mask begins at key 0? The queries are the last T of S tokens": _masked(
                mine, keys, values, torch.ones(T, S, dtype=torch.bool).tril()),
            "the new tokens alone? What is kept belongs to it": naive_attention(
                mine, keys[:, :, before:], values[:, :, before:]),
            "no division by sqrt(K)?": naive_attention(mine * K**0.5, keys, values),
            "divided by K, not by sqrt(K)?": naive_attention(mine / K**0.5, keys, values),
            "are q's heads cut as (KV, G), in this order?": naive_attention(mine[:, dealt], keys, values),
            "itself is not seen? Query t sees key t": _masked(
                mine, keys, values, torch.ones(T, S, dtype=torch.bool).tril(before - 1))}


def _masked(q, k, v, seen):
    """Plain attention with the mask `seen` (T, S)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@functools.cache
def model(heads: int = 4, kv: int = 2) -> Decoder:
    """A float64 decoder; weights far from 0, so that its likeliest tokens differ."""
    config = ModelConfig(61, 24, 2, heads, kv, 6, 40, 32)
    net = init_weights(Decoder(config, "naive"), seed=15).double().requires_grad_(False)
    for weight in net.parameters():
        weight.mul_(6 if weight.dim() > 1 else 1)
    return net


def tokens(B: int, P: int) -> torch.Tensor:
    """Prompts: (B, P)."""
    return torch.randint(61, (B, P), generator=torch.Generator().manual_seed(100 * B + P))


@functools.cache
def greedy(B: int, P: int, n: int) -> torch.Tensor:
    """The likeliest n tokens, each by a forward over all: (B, n)."""
    x = tokens(B, P)
    for _ in range(n):
        x = torch.cat([x, model()(x)[:, -1:].argmax(-1)], 1)
    return x[:, P:]


def run(subject, B: int, P: int, n: int) -> dict:
    """What `subject` makes of B prompts of P tokens, and what it did with model, head and memory."""
    net, calls, rows, caches, asked = model(), [], [], [], []
    hidden = net.hidden_states

    def make(capacity):
        asked.append(capacity)
        caches.append(KVCache(net.config.layers, capacity))
        return caches[-1]

    def noted(x, positions=None, cache=None):
        places = torch.arange(x.shape[1]) if positions is None else positions
        calls.append((x, places.view(-1, x.shape[1])[0].tolist(), cache.length if cache else 0))
        return hidden(x, positions, cache)

    hook = net.head.register_forward_hook(lambda _, args, __: rows.append(args[0].flatten(0, -2).shape[0]))
    try:
        with mock.patch.object(net, "hidden_states", noted):
            made = subject(net, tokens(B, P), n, make)
    finally:
        hook.remove()
    return {"made": made, "calls": calls, "rows": rows, "asked": asked}
