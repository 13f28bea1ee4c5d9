"""Generation, one sequence at a time: prefill the prompt once, then one token a step over a KV cache.

Without the KV cache, token n costs a forward over n tokens; with it, one token's forward and a read of the
2 L KV K n numbers in the cache. Works with any Decoder: the cache is an argument of the call. The engine
(engine/engine.py) serves many sequences at once; engine/sampler.py samples the tokens.
"""
import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from nanoinfra.distributed.cpu_threads import set_torch_threads
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.model.attention_cores import naive_attention, sdpa_attention
from nanoinfra.model.attention_mask import CAUSAL_MASK, AttentionMask
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.tokenizer import Tokenizer, apply_chat_template
from nanoinfra.model.weights.read_weights_into_decoder import decoder_on_meta_device
from nanoinfra.parallel.parallelize import parallelize_for_serving
from nanoinfra.serve.command_line_options import GenerateOptions
from nanoinfra.serve.engine.detokenizer import IncrementalDetokenizer
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams, check_request
from nanoinfra.serve.engine.sampler import Sampler
from nanoinfra.train.load_and_export_models import open_pretrained_weights


def generate(model: Decoder, prompt_token_ids: list[int], max_new_tokens: int, *, temperature: float = 0.0,
             top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             eos_token_ids: Iterable[int] = ()) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue the prompt, each as soon as it is known.

    An id of `eos_token_ids` ends it and is not yielded. Temperature 0 is greedy; else the tokens follow from
    `seed` alone. Raises ValueError for an empty prompt, a sampling option out of range, or a prompt whose
    continuation does not fit the model's context.
    """
    params = SamplingParams(temperature, top_k, top_p, seed=seed)
    request = Request("", prompt_token_ids, params, max_new_tokens)
    check_request(request, model.config.max_cacheable_seq_len, model.config.vocab)
    return _generate(model, prompt_token_ids, max_new_tokens, Sampler(params, seed), frozenset(eos_token_ids))


@torch.inference_mode()
def _generate(model, prompt_token_ids, max_new_tokens, sampler, eos_token_ids):
    device = model.embed.weight.device
    cache = KVCache(model.config.layers,
                    len(prompt_token_ids) + max_new_tokens - 1)     # not the last token's
    new = list(prompt_token_ids)
    for _ in range(max_new_tokens):
        positions = torch.arange(cache.length, cache.length + len(new), device=device)
        hidden = model.hidden_states(torch.tensor([new], device=device), positions, cache)     # (1, T, C)
        cache.length += len(new)
        token = sampler.sample_next_token(model.head(hidden[0, -1]))                    # of (V,) logits
        if token in eos_token_ids:
            return
        yield token
        new = [token]


class KVCache:
    """A contiguous KV cache: keys and values of every layer, for sequences of one common length.

    A layer's first call allocates memory for `capacity` tokens in the shape of its keys, so a tensor-parallel
    model needs no other cache. The caller adds to `length` once all layers have stored the new tokens.
    """

    def __init__(self, num_layers: int, capacity: int):
        self.layers, self.capacity = [None] * num_layers, capacity
        self.length = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
        """Store `k`, `v` (B, KV, T, K); attend with `q` to all keys so far, as `mask` says: (B, H, T, K)."""
        (B, KV, T, K), end = k.shape, self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a KV cache for {self.capacity}; make a larger one")
        if self.layers[layer] is None:
            self.layers[layer] = k.new_empty(2, B, KV, self.capacity, K)
        keys, values = self.layers[layer]                                 # (B, KV, capacity, K) each
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        core = naive_attention if T == 1 else sdpa_attention    # for one query sdpa is slower on CPU
        return core(q, keys[:, :, :end], values[:, :, :end], mask)


def main(options: GenerateOptions, write: Callable[[str], object] | None = None) -> int:
    """Write the continuation of a prompt, or the answer to it, to `write` (stdout) as it grows; returns 0."""
    set_torch_threads(options.threads, options.tp)
    if options.tp < 1:
        raise ValueError(f"--tp {options.tp}: a model is cut over at least 1 rank; leave it out")
    mesh = Mesh(tp=options.tp)
    weights = open_pretrained_weights(options.model, mesh.world)
    tokenizer, dtype = weights.tokenizer, getattr(torch, options.dtype)
    model = parallelize_for_serving(decoder_on_meta_device(weights.config), mesh, weights.read_parameter,
                                    dtype)
    write = write or _to_stdout if mesh.rank == 0 else _nowhere               # all ranks have the same tokens
    prompt_token_ids = _encode_prompt(options, tokenizer, weights.chat_template)
    for piece in stream_text(model, tokenizer, prompt_token_ids, options):
        write(piece)
    write("\n")
    return 0


def stream_text(model: Decoder, tokenizer: Tokenizer, prompt_token_ids: list[int],
                options: GenerateOptions) -> Iterator[str]:
    """Generate the continuation of a prompt and yield its text piece by piece."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "seed")}
    for token in generate(model, prompt_token_ids, options.max_new_tokens,
                          eos_token_ids=tokenizer.eos_token_ids,
                          **sampling):
        yield detokenizer.push_token(token)
    yield detokenizer.flush()


def _encode_prompt(options, tokenizer, chat_template):
    if tokenizer is None:
        raise ValueError(f"{options.model} holds no tokenizer to read the prompt with; copy the "
                         "files of the one it was trained with into it")
    if not options.chat:
        return tokenizer.encode(options.prompt)
    if chat_template is None:
        raise ValueError(f"{options.model} has no chat template; leave out --chat")
    messages = [{"role": "user", "content": options.prompt}]
    return tokenizer.encode(apply_chat_template(chat_template, messages, tokenizer), add_special_tokens=False)


def _nowhere(piece):
    pass


def _to_stdout(piece):
    sys.stdout.write(piece)
    sys.stdout.flush()
