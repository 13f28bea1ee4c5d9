"""Known-wrong windows and stretched RoPEs.

`attend` is a core on keys whose values say which they are, `serve` an engine's answer beside the model's own,
`turn` the angles of one position; a mutant of the library is patched in.
"""
import math
from dataclasses import replace

import torch

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model import rope
from nanoinfra.model.attention_cores import ATTENTION_CORES, sdpa_attention
from nanoinfra.model.attention_mask import AttentionMask, additive_mask, hidden_key_mask
from nanoinfra.model.decoder import Decoder
from nanoinfra.serve.engine.cpu_decoder_block import CpuPagedKVCache
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.load_engine import pack_weights_and_use_c_kernels
from nanoinfra.serve.engine.paged_attention import PagedKVCache
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.generate_with_kv_cache import generate

window, pages, stretch = Check("window"), Check("pages"), Check("stretch")
SMALL = ModelConfig(31, 16, 2, 2, 1, 8, 24, 64)
K, THETA, FIRST = 16, 5000.0, 256            # head_dim, base, original context


def attend(core, T, S, W):
    """(T, S): how much of each key each query sees, all keys being alike."""
    q, k, v = torch.zeros(1, 1, T, S), torch.zeros(1, 1, S, S), torch.eye(S)[None, None]
    return ATTENTION_CORES[core](q, k, v, AttentionMask(W))[0, 0]


@window.criterion("a query sees the last W keys up to its own, itself included", "property")
def _(subject):
    for core in ("naive", "sdpa"):
        for T, S, W in ((6, 6, 3), (1, 6, 3), (2, 6, 1), (6, 6, 6), (6, 6, 9), (3, 6, 5)):
            for t, seen in enumerate((subject(core, T, S, W) > 1e-6).tolist()):
                at = S - T + t
                if seen != [at - W < s <= at for s in range(S)]:
                    raise CriterionNotMet(f"{core}: query {at} of window {W} sees keys {seen}")


def serve(kernels):
    """(what an engine says to a prompt longer than its window, what it should)."""
    torch.manual_seed(0)
    model = Decoder(replace(SMALL, layers=4, window=6, full_layers=1)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = [5 * i % 31 for i in range(20)]
    want = list(generate(model, tokens, 12))
    engine, said = Engine(model, num_blocks=20, block_size=4, max_num_batched_tokens=7), []
    if kernels:
        pack_weights_and_use_c_kernels(engine)
    engine.add_request(Request("r", tokens, SamplingParams(temperature=0), max_tokens=12))
    while engine.has_unfinished_requests:
        said += [token for event in engine.step() for token in event.token_ids]
    return said, want


@pages.criterion("an engine says what the model says alone", "parity")
def _(subject):
    for kernels in (False, True):
        said, want = subject(kernels)
        if said != want:
            raise CriterionNotMet(f"{'C passes' if kernels else 'torch'}: {said}, want {want}")


def turn(scaling, length=FIRST):
    """Angle of each pair at position 1 of a sequence of `length`, and what cos and sin are multiplied by."""
    config = replace(SMALL, head_dim=K, theta=THETA, rope_scaling=scaling)
    cos, sin = rope.rope_cos_sin(torch.arange(length), config, torch.float64)
    return torch.atan2(sin[0, 1], cos[0, 1]).tolist(), float(torch.hypot(sin[0, 1], cos[0, 1])[0])


def plain(theta=THETA):
    return [theta ** (-2 * j / K) for j in range(K // 2)]


def near(got, want, what):
    for j, (a, b) in enumerate(zip(got, want, strict=True)):
        if abs(a - b) > 1e-9 * b:
            raise CriterionNotMet(f"{what}: pair {j} turns by {a}, want {b}")


@stretch.criterion("linear scaling divides every pair", "property")
def _(subject):
    near(subject(RopeScaling("linear", 4.0))[0], [f / 4 for f in plain()], "linear")


@stretch.criterion("dynamic scaling begins past the original context, by the sequence's length", "property")
def _(subject):
    for length in (10, FIRST, FIRST + 1, 3 * FIRST):
        grown = (2.0 * max(1, length / FIRST) - 1) ** (K / (K - 2))
        near(subject(RopeScaling("dynamic", 2.0, FIRST), length)[0], plain(THETA * grown), f"length {length}")


@stretch.criterion("yarn's ramp goes along the pairs between two numbers of turns", "property")
def _(subject):
    low, high = (K / 2 * math.log(FIRST / (2 * math.pi * turns)) / math.log(THETA) for turns in (16.0, 2.0))
    for truncate in (True, False):
        a, b = (math.floor(low), math.ceil(high)) if truncate else (low, high)
        ramp = [min(1, max(0, (j - max(0, a)) / (b - max(0, a)))) for j in range(K // 2)]
        want = [f / 4 * r + f * (1 - r) for f, r in zip(plain(), ramp)]
        got, factor = subject(RopeScaling("yarn", 4.0, FIRST, beta_fast=16.0, beta_slow=2.0,
                                          attention_factor=1.25, truncate=truncate))
        near(got, want, f"yarn, truncate {truncate}")
        if abs(factor - 1.25) > 1e-12:
            raise CriterionNotMet(f"cos and sin are multiplied by {factor}, want 1.25")


@stretch.criterion("llama3's ramp goes along the number of turns", "property")
def _(subject):
    kept = [min(1, max(0, (FIRST * f / (2 * math.pi) - 1) / 3)) for f in plain()]
    want = [f * k + f / 8 * (1 - k) for f, k in zip(plain(), kept)]
    near(subject(RopeScaling("llama3", 8.0, FIRST))[0], want, "llama3")


def wider(right):
    return lambda mask, *args: right(mask._replace(window=mask.window + 1), *args)


def without_window(right):
    return lambda mask, *args: right(mask._replace(window=None), *args)


def blind_in_chunks(q, k, v, mask):
    return sdpa_attention(q, k, v, mask._replace(window=None))


class BlindAlone(PagedKVCache):
    def _attend_decodes(self, memory, q, mask):
        return super()._attend_decodes(memory, q, AttentionMask())


class BlindInC(CpuPagedKVCache):
    def rope_cache_and_attend(self, attn, qkv, rope):
        attn.mask = AttentionMask()
        return super().rope_cache_and_attend(attn, qkv, rope)


def all_factors(frequency, scaling, theta):
    return frequency / scaling.factor


def pairs_from_the_front(frequency, scaling, theta, right=rope._yarn):
    return right(frequency, replace(scaling, beta_fast=scaling.beta_slow, beta_slow=scaling.beta_fast), theta)


def always_whole(frequency, scaling, theta, right=rope._yarn):
    return right(frequency, replace(scaling, truncate=True), theta)


def swapped(frequency, scaling, theta, right=rope._llama3):
    return right(frequency, replace(scaling, low_freq_factor=scaling.low_freq_factor * 2), theta)


def by_factor_alone(scaling, theta, head_dim, length):
    return theta * scaling.factor ** (head_dim / (head_dim - 2))


def stretched(**kinds):
    return patched(turn, "nanoinfra.model.rope:ROPE_FREQUENCY_SCALING", {**rope.ROPE_FREQUENCY_SCALING,
                                                                         **kinds})


SEES, = (c.name for c in window.criteria)
SAYS, = (c.name for c in pages.criteria)
LINEAR, DYNAMIC, YARN, LLAMA3 = (c.name for c in stretch.criteria)
NAIVES, SDPAS = (f"nanoinfra.model.attention_cores:{name}" for name in ("hidden_key_mask", "additive_mask"))
MUTANTS = [
    Mutant("a window is one key too wide", window, patched(attend, NAIVES, wider(hidden_key_mask)), SEES),
    Mutant("sdpa's window is one key too wide", window, patched(attend, SDPAS, wider(additive_mask)), SEES),
    Mutant("a window hides nothing", window, patched(attend, NAIVES, without_window(hidden_key_mask)), SEES),
    Mutant("sdpa's window hides nothing", window, patched(attend, SDPAS, without_window(additive_mask)),
           SEES),
    Mutant("chunks see past their window", pages,
           patched(serve, "nanoinfra.serve.engine.paged_attention:sdpa_attention", blind_in_chunks), SAYS),
    Mutant("single queries see past their window", pages,
           patched(serve, "nanoinfra.serve.engine.engine:PagedKVCache", BlindAlone), SAYS),
    Mutant("the C passes know no window", pages,
           patched(serve, "nanoinfra.serve.engine.cpu_decoder_block:CpuPagedKVCache", BlindInC), SAYS),
    Mutant("linear divides nothing", stretch, stretched(linear=lambda f, scaling, theta: f), LINEAR),
    Mutant("dynamic grows by its factor at once", stretch,
           patched(turn, "nanoinfra.model.rope:dynamic_ntk_theta", by_factor_alone), DYNAMIC),
    Mutant("yarn divides every pair", stretch, stretched(yarn=all_factors), YARN),
    Mutant("yarn's borders are swapped", stretch, stretched(yarn=pairs_from_the_front), YARN),
    Mutant("yarn's borders are always whole", stretch, stretched(yarn=always_whole), YARN),
    Mutant("llama3 divides every pair", stretch, stretched(llama3=all_factors), LLAMA3),
    Mutant("llama3's lower border is elsewhere", stretch, stretched(llama3=swapped), LLAMA3),
]
