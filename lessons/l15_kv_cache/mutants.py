"""Known-wrong attention over a cache and known-wrong loops around it: each has one mistake that a check must
find."""
import math

import torch

from lessons.l15_kv_cache import checks as check
from nanoinfra.lab.mutants import Mutant


def remembering(memory, length, q, k, v, at=None, write=None, slots=(0, 1), first=0, diagonal=None,
                scale=None, groups=None, take=lambda kept: kept, new=lambda k, v: (k, v)):
    """The right one, with a place for each slip."""
    (_, KV, T, K), H = k.shape, q.shape[1]
    end = length + T
    at = length if at is None else at(length, T)
    if write is None:
        for slot, x in zip(slots, new(k, v)):
            memory[slot, :, :, at:at + T] = x
        keys, values = (take(memory[i, :, :, first:end]) for i in (0, 1))
    else:
        keys, values = write(memory, length, k, v)
    G = H // keys.shape[1]
    order = groups(H, KV) if groups else [*range(H)]
    q = q[:, order].unflatten(1, (-1, G))                                 # (B, KV, G, T, K)
    scores = q.flatten(2, 3) @ keys.mT / (math.sqrt(K) if scale is None else scale)
    scores = scores.unflatten(2, (G, T))                                  # (B, KV, G, T, S)
    seen = torch.ones(T, scores.shape[-1], dtype=torch.bool)
    seen = seen.tril(length if diagonal is None else diagonal(length, T))
    scores = scores.masked_fill(~seen, -math.inf)
    y = (scores.softmax(-1).flatten(2, 3) @ values).unflatten(2, (G, T)).flatten(1, 2)
    return y[:, torch.tensor(order).argsort()]                            # (B, H, T, K)


def slip(**change):
    return lambda *args: remembering(*args, **change)


def returns_nothing(*args):
    remembering(*args)


def writes_in_float32(memory, length, q, k, v):
    return remembering(memory, length, q, k, v, new=lambda k, v: (k.float(), v.float()))


def puts_together_and_forgets(memory, length, q, k, v):
    def write(memory, length, k, v):
        return (torch.cat([memory[i, :, :, :length], x], 2) for i, x in enumerate((k, v)))
    return remembering(memory, length, q, k, v, write=write)


def copies_what_is_kept(*args):
    return remembering(*args, take=torch.clone)


def repeats_keys_for_each_query_head(memory, length, q, k, v):
    G = q.shape[1] // k.shape[1]
    return remembering(memory, length, q, k, v, take=lambda kept: kept.repeat_interleave(G, 1))


def looks_for_nan_first(*args):
    return remembering(*args, take=lambda kept: kept if kept.sum().isfinite() else None)


class Shelf:
    """One memory for all layers."""
    memory = torch.empty(0)


def reads_one_memory_for_all_layers(memory, length, q, k, v):
    if length == 0 or Shelf.memory.shape != memory.shape:
        Shelf.memory = memory
    remembering(memory, length, q, k, v)
    return remembering(Shelf.memory, length, q, k, v)


def reads_all_of_the_memory(memory, length, q, k, v):
    def write(memory, length, k, v):
        end = length + k.shape[2]
        memory[0, :, :, length:end], memory[1, :, :, length:end] = k, v
        return memory
    return remembering(memory, length, q, k, v, write=write)


def mixes_up_rows_of_g_and_t(memory, length, q, k, v):
    y, (G, T) = remembering(memory, length, q, k, v), (q.shape[1] // k.shape[1], q.shape[2])
    return y.unflatten(1, (-1, G)).flatten(2, 3).unflatten(2, (T, G)).transpose(2, 3).flatten(1, 2)


def cuts_q_as_g_and_kv(memory, length, q, k, v):
    q = q.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
    return remembering(memory, length, q, k, v)


def interleaves(H, KV):
    return [h * KV + kv for kv in range(KV) for h in range(H // KV)]


def going(model, prompt, n, make, capacity=lambda P, n: P + n - 1, feed=None, place=None, advance=True,
          head=lambda model, hidden: model.head(hidden[:, -1]), pick=lambda logits: logits.argmax(-1, True),
          calls=0, first=lambda tokens: [tokens], with_prompt=False):
    """The right loop, with a place for each slip."""
    cache, all_, made = make(capacity(prompt.shape[1], n)), prompt, []
    todo = first(prompt)
    for _ in range(n + calls + len(todo) - 1):
        new = todo.pop(0) if todo else feed(all_) if feed else made[-1]
        begin = cache.length if place is None else place(cache.length, prompt.shape[1])
        hidden = model.hidden_states(new, torch.arange(begin, begin + new.shape[1]), cache)
        cache.length += new.shape[1] if advance else 0
        if todo:
            continue
        made.append(pick(head(model, hidden)))                            # (B, 1)
        all_ = torch.cat([all_, made[-1]], 1)
    return all_ if with_prompt else torch.cat(made, 1)[:, :n]


def loop(**change):
    return lambda *args: going(*args, **change)


def gives_nothing(*args):
    going(*args)


def runs_all_tokens_again(model, prompt, n, make):
    make(prompt.shape[1] + n - 1)
    for _ in range(n):
        logits = model.hidden_states(prompt)[:, -1:].matmul(model.head.weight.T)
        prompt = torch.cat([prompt, logits.argmax(-1)], 1)
    return prompt[:, -n:]


def keeps_the_cache_and_runs_all_again(model, prompt, n, make):
    """A new cache a call."""
    made = prompt
    for _ in range(n):
        cache = make(made.shape[1])
        hidden = model.hidden_states(made, torch.arange(made.shape[1]), cache)
        made = torch.cat([made, model.head(hidden[:, -1]).argmax(-1, True)], 1)
    return made[:, -n:]


def counts_twice(model, prompt, n, make):
    """Places by a counter of its own, and a cache that is one ahead."""
    cache, new, made, begin = make(prompt.shape[1] + n), prompt, [], 0
    for _ in range(n):
        hidden = model.hidden_states(new, torch.arange(begin, begin + new.shape[1]), cache)
        begin += new.shape[1]
        cache.length = begin + 1
        new = model.head(hidden[:, -1]).argmax(-1, True)
        made.append(new)
    return torch.cat(made, 1)


def every_row(model, hidden):
    return model.head(hidden)[:, -1]


KEEPS, ITSELF, LATER, PARITY, DECODER, COPIES, READS = (c.name for c in check.attend.criteria)
SHAPE, PLACES, SAYS, CALLS, ROWS, MEMORY = (c.name for c in check.generate.criteria)
ATTEND = {
    "sees later tokens": (slip(diagonal=lambda length, T: length + T), LATER),
    "begins its mask at key 0": (slip(diagonal=lambda length, T: 0), PARITY),
    "returns nothing": (returns_nothing, ITSELF),
    "sees one token too few": (slip(diagonal=lambda length, T: max(length - 1, 0)), PARITY),
    "masks its own key": (slip(diagonal=lambda length, T: length - 1), ITSELF),
    "mixes up rows of G and T": (mixes_up_rows_of_g_and_t, LATER),
    "cuts q as (G, KV)": (cuts_q_as_g_and_kv, PARITY),
    "sees one token too many": (slip(diagonal=lambda length, T: length + 1), LATER),
    "sees the new tokens alone": (lambda memory, length, *qkv: remembering(
        memory, length, *qkv, first=length, diagonal=lambda *_: 0), PARITY),
    "writes at the beginning": (slip(at=lambda length, T: 0), KEEPS),
    "writes over the last token": (slip(at=lambda length, T: max(length - 1, 0)), KEEPS),
    "writes values for keys": (slip(slots=(1, 0)), KEEPS),
    "writes in float32": (writes_in_float32, KEEPS),
    "puts together and forgets": (puts_together_and_forgets, KEEPS),
    "does not divide": (slip(scale=1.0), PARITY),
    "divides by K": (lambda *args: remembering(*args, scale=args[2].shape[-1]), PARITY),
    "deals query heads in turn": (slip(groups=interleaves), ITSELF),
    "reads what is not there": (reads_all_of_the_memory, ITSELF),
    "reads one memory for all layers": (reads_one_memory_for_all_layers, DECODER),
    "looks for NaN first": (looks_for_nan_first, READS),
    "copies what is kept": (copies_what_is_kept, COPIES),
    "repeats keys for each query head": (repeats_keys_for_each_query_head, COPIES),
}
GENERATE = {
    "runs all tokens again": (runs_all_tokens_again, PLACES),
    "makes a new cache each call": (keeps_the_cache_and_runs_all_again, PLACES),
    "gives nothing": (gives_nothing, SHAPE),
    "gives the prompt too": (loop(with_prompt=True), SHAPE),
    "puts each token at place 0": (loop(place=lambda length, P: 0), PLACES),
    "puts each token one place too far": (loop(place=lambda length, P: length + (length > 0)), PLACES),
    "forgets to count": (loop(advance=False, place=None), PLACES),
    "counts twice": (counts_twice, PLACES),
    "runs the last token too": (loop(calls=1, capacity=lambda P, n: P + n), PLACES),
    "feeds the prompt's last token again": (loop(feed=lambda all_: all_[:, -2:-1]), PLACES),
    "answers with the first row": (loop(head=lambda model, hidden: model.head(hidden[:, 0])), SAYS),
    "takes the unlikeliest": (loop(pick=lambda logits: logits.argmin(-1, True)), SAYS),
    "gives all sequences the first one's token":
        (loop(pick=lambda logits: logits.argmax(-1, True)[:1].expand(len(logits), 1)), SAYS),
    "reads the prompt token by token": (loop(first=lambda tokens: [*tokens.split(1, 1)]), CALLS),
    "reads the prompt but for its last": (loop(first=lambda tokens: [
        part for part in (tokens[:, :-1], tokens[:, -1:]) if part.shape[1]]), CALLS),
    "takes the head of all rows": (loop(head=every_row), ROWS),
    "keeps room for the last token": (loop(capacity=lambda P, n: P + n), MEMORY),
    "takes memory for the context": (loop(capacity=lambda P, n: 32), MEMORY),
}
MUTANTS = [Mutant(name, judge, *slipped)
           for judge, slips in ((check.attend, ATTEND), (check.generate, GENERATE))
           for name, slipped in slips.items()]
