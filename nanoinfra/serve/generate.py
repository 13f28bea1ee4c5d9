"""Generation, one sequence at a time: prefill the prompt once, then one token a step over a KV cache.

Without the cache, token n costs a forward over n tokens; with it, one token's forward and a read of the
2 L KV K n numbers kept. Composes with any Decoder: the cache is an argument of the call. For many sequences
at once see engine.py; sampler.py draws the tokens.
"""
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from nanoinfra.distributed.cpu_threads import use_threads
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.attention import CAUSAL, Mask, naive, sdpa
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Text, render_chat
from nanoinfra.model.weights.fill_model import empty
from nanoinfra.parallel.parallelize import serving
from nanoinfra.serve.engine.detokenizer import Stream
from nanoinfra.serve.engine.requests import Request, Sampling, check
from nanoinfra.serve.engine.sampler import Sampler
from nanoinfra.serve.options import GenerateOptions
from nanoinfra.train.pretrained import open_pretrained


def generate(model: Decoder, tokens: list[int], max_new: int, *, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, ends: Iterable[int] = ()) -> Iterator[int]:
    """Yield up to `max_new` ids that continue `tokens`, each as soon as it is known; an id of `ends` stops.

    Temperature 0 is greedy; else the draws follow from `seed` alone. Raises ValueError for an empty prompt, a
    sampling option out of range, or a prompt whose continuation does not fit the model's context.
    """
    how = Sampling(temperature, top_k, top_p, seed=seed)
    check(Request("", tokens, how, max_new), model.config.cached_context, model.config.vocab)
    return _generate(model, tokens, max_new, Sampler(how, seed), frozenset(ends))


@torch.inference_mode()
def _generate(model, tokens, max_new, sampler, ends):
    device = model.embed.weight.device
    cache = KVCache(model.config.layers, len(tokens) + max_new - 1)          # nobody reads the last
    new = list(tokens)
    for _ in range(max_new):
        places = torch.arange(cache.length, cache.length + len(new), device=device)
        hidden = model.hidden(torch.tensor([new], device=device), places, cache)        # (1, T, C)
        cache.length += len(new)
        token = sampler.draw(model.head(hidden[0, -1]))                                 # of (V,) logits
        if token in ends:
            return
        yield token
        new = [token]


class KVCache:
    """Keys and values of every layer in one stretch of memory, for sequences of one common length.

    Memory for `capacity` tokens is taken at a layer's first call, in the shape its keys have, so a model
    cut by heads needs no other cache. The caller adds to `length` once all layers have seen the new tokens.
    """

    def __init__(self, layers: int, capacity: int):
        self.layers, self.capacity, self.length = [None] * layers, capacity, 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               mask: Mask = CAUSAL) -> torch.Tensor:
        """Keep `k`, `v` (B, KV, T, K) and let `q` (B, H, T, K) see of all so far what `mask` says."""
        (B, KV, T, K), end = k.shape, self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a KV cache for {self.capacity}; make a larger one")
        if self.layers[layer] is None:
            self.layers[layer] = k.new_empty(2, B, KV, self.capacity, K)
        keys, values = self.layers[layer]                                 # (B, KV, capacity, K) each
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        core = naive if T == 1 else sdpa  # for one query two matrix products beat the fused kernel on CPU
        return core(q, keys[:, :, :end], values[:, :, :end], mask)


def main(options: GenerateOptions, write: Callable[[str], object] | None = None) -> int:
    """Write the continuation of a prompt, or the answer to it, to `write` (stdout) as it grows; returns 0."""
    use_threads(options.threads, options.tp)
    if options.tp < 1:
        raise ValueError(f"--tp {options.tp}: a model is cut over at least 1 rank; leave it out")
    mesh = Mesh(tp=options.tp)
    weights = open_pretrained(options.model, mesh.world)
    text, dtype = weights.text, getattr(torch, options.dtype)
    model = serving(empty(weights.config), mesh, weights.read, dtype)
    write = write or _to_stdout if mesh.rank == 0 else _nowhere               # the ranks draw the same tokens
    for piece in stream(model, text, _prompt(options, text, weights.template), options):
        write(piece)
    write("\n")
    return 0


def stream(model: Decoder, text: Text, prompt: list[int], options: GenerateOptions) -> Iterator[str]:
    """The continuation of `prompt` (token ids) as pieces of text."""
    shown = Stream(text)
    how = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    for token in generate(model, prompt, options.max_new_tokens, ends=text.ends, **how):
        yield shown.push(token)
    yield shown.finish()


def _prompt(options, text, template):
    if text is None:
        raise ValueError(f"{options.model} holds no tokenizer to read the prompt with; copy the "
                         "files of the one it was trained with into it")
    if not options.chat:
        return text.encode(options.prompt)
    if template is None:
        raise ValueError(f"{options.model} has no chat template; leave out --chat")
    messages = [{"role": "user", "content": options.prompt}]
    return text.encode(render_chat(template, messages, text), begin=False)


def _nowhere(piece):
    pass


def _to_stdout(piece):
    sys.stdout.write(piece)
    sys.stdout.flush()
