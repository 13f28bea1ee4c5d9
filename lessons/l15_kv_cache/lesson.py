# %% [markdown]
# # Lesson 15. KV cache and the two phases of serving
# **2019** · Shazeer, *Fast transformer decoding: one write-head is all you need* (MQA). **2022** · Pope et
# al., *Efficiently scaling transformer inference*. **2023** · Ainslie et al., *GQA*.
#
# **Needs** a CPU. **Time** 75 minutes. **Builds on** lesson 00 (the FLOPs of a forward, a machine's peak).
#
# After this you can compute what a token costs while a prompt is read and while an answer is written, what it
# leaves in memory, and how many tokens a second a machine can write at most.

# %%
# %load_ext nanoinfra.lab.exercise
import functools
import inspect
import os
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from lessons.l15_kv_cache import checks as check
from lessons.l15_kv_cache import figures
from lessons.l15_kv_cache.exercise_cache import ExerciseKVCache
from nanoinfra.config import ModelConfig
from nanoinfra.formulas import inference_cost
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, describe_machine, measure, timed
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.serve import generate_with_kv_cache as real
from nanoinfra.serve.engine.packed_linear import PackedInPort, PackedLinear, pack_linears

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
V, C, L, H, F, P, S = (4096, 512, 2, 8, 1408, 32, 128) if FAST else (4096, 1024, 4, 16, 2816, 128, 512)
K, D = C // H, 4                             # float32: d is 4 bytes a number
KINDS = {"mha": H, "gqa": H // 4, "mqa": 1}                        # KV heads
CONFIGS = {kind: ModelConfig(V, C, L, H, KV, K, F, context=1024) for kind, KV in KINDS.items()}
MHA, BATCHES, REPEATS = CONFIGS["mha"], *(((1, 2, 8), 3) if FAST else ((1, 2, 4, 8, 16, 32), 5))
torch.set_num_threads(1)                     # one core: your browser keeps the others

# %% [markdown]
# ## 1. The wall
# A trained decoder writes: it reads all tokens so far, its head says which is likeliest next, that one is put
# behind the others, and it reads again. How much work is the n-th token?

# %%
def again(model, tokens):
    """The next token of each sequence, (B, 1), by a forward over all its tokens, (B, n)."""
    return model.head(model.hidden_states(tokens)[:, -1]).argmax(-1, keepdim=True)


@functools.cache
def again_flops(n):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        again(Decoder(MHA, "naive"), torch.zeros(1, n).long())
    return counter.get_total_flops()


plain, ns = init_weights(Decoder(MHA), seed=0).requires_grad_(False), (1, S // 8, S // 4, S // 2, S)
seconds = [timed(lambda n=n: again(plain, torch.zeros(1, n).long()), 3) for n in ns]
DisplayTable(f"one more token, on one of {describe_machine()}", ("n", "GFLOPs, counted", "a forward over n"),
             [(str(n), f"{again_flops(n) / 1e9:.2f}", str(each)) for n, each in zip(ns, seconds)])

# %% [markdown]
# In FLOPs the n-th token costs n times the first, and all n of an answer n²/2 times; nearly all of that was
# computed before. In seconds it was less: the first is slower than its FLOPs explain. Section 2 says why.
#
# ## 2. Predict
# **The cache.** Attention is causal: a token that is there changes no more, in no layer. Of each, later ones
# need its keys and its values, and nothing else. Keep those: 2·L·KV·K numbers a token. With KV = H, *MHA*,
# each query head has keys of its own. In *GQA* H/KV share them, in *MQA* all do: KV = 1.
#
# **Two phases.** *Prefill* runs all P tokens of a prompt in one call. *Decode* runs one token a call, which
# looks at S, itself included. A token costs 2 FLOPs for each entry of its layers' matrices (lesson 00) and
# 4·H·K·S a layer for scores and values, where S is the keys of the call: P in a prefill. The causal half is
# not taken off. The head, 2·C·V, reads the last token alone.
#
# **Bytes.** A call reads d·Ψ bytes of weights (norms' too; of an untied embedding only a row a token), once,
# however many tokens run, and S cached tokens of each sequence. FLOPs over these bytes are its *intensity*.
#
# **Ceilings.** With β bytes/s and π FLOP/s a call takes max(bytes/β, FLOPs/π) at least. Decoding B sequences
# gives B tokens. All share the weights, nobody shares a cache.

# %%
rates = figures.measure_read_bandwidths(NBYTES := 2**26 if FAST else 2**28)
beta, pi = max(rates.values()), figures.measure_matmul_rate()
print(f"{V=} {C=} {L=} {H=} {K=} {F=}, a SwiGLU, a tied head, float32: d={D}; KV={KINDS}; {P=} {S=}\n"
      f"this machine, one core: beta={beta / 1e9:.1f} GB/s, pi={pi / 1e9:.0f} GFLOP/s, timed")
DisplayTable("reading a large tensor: best of 7", ("", "GB/s"),
             [(how, f"{x / 1e9:.1f}") for how, x in rates.items()])

# %% [markdown]
# Commit twelve numbers. *kv*: bytes that a token keeps, for three kinds; the rest is MHA. *FLOPs*: of a
# prefill of P, of a decode at S, one sequence, and of that token by `again`. *Intensity* of prefill, decode.
# *Even*: how many sequences (a fraction) of S tokens have caches as large as the weights? Then the ceilings
# in *tokens/s*: of one prompt's P tokens, while it is read; of decode at S, with 1 and with 8 sequences.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L15.kv_mha", <formula>, "B")                       and kv_gqa, kv_mqa
# predict("L15.flops_prefill", <formula>, "FLOPs")            and flops_decode, flops_again
# predict("L15.intensity_prefill", <formula>, "FLOPs/B")      and intensity_decode
# predict("L15.even", <formula>, "sequences")
# predict("L15.prefill_1", <formula>, "tokens/s")             and decode_1, decode_8
### BEGIN SOLUTION
entries = 4 * C * H * K + 3 * C * F                            # of a layer's matrices
weights, kv, head = D * (V * C + L * (entries + 2 * C) + C), D * 2 * L * H * K, 2 * C * V


def flops(new, total):
    return new * L * (2 * entries + 4 * H * K * total) + head


for kind, KV in KINDS.items():
    predict(f"L15.kv_{kind}", D * 2 * L * KV * K, "B")
predict("L15.flops_prefill", flops(P, P), "FLOPs")
predict("L15.flops_decode", flops(1, S), "FLOPs")
predict("L15.flops_again", flops(S, S), "FLOPs")
predict("L15.intensity_prefill", flops(P, P) / (weights + P * kv), "FLOPs/B")
predict("L15.intensity_decode", flops(1, S) / (weights + S * kv), "FLOPs/B")
predict("L15.even", weights / (S * kv), "sequences")
predict("L15.prefill_1", P / max((weights + P * kv) / beta, flops(P, P) / pi), "tokens/s")
for n in (1, 8):
    predict(f"L15.decode_{n}", n / max((weights + n * S * kv) / beta, n * flops(1, S) / pi), "tokens/s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# Which keys each token attends to, from the model's own causal mask: a row is a new token, a column a key.
# A *chunk* of tokens after others is the general case: prefill is a chunk after none, decode a chunk of one.

# %%
figures.attention_mask_picture({"prefill": (6, 6), "a chunk": (3, 9), "decode": (1, 10)},
                               "three calls, one after another")

# %% [markdown]
# **Exercise 1: attend.** A layer's memory is (2, B, KV, capacity, K), keys and values; `length` tokens are
# there, the rest is not a number. Write `k` and `v` (B, KV, T, K) behind them, in place. Then each query of
# `q` (B, H, T, K) sees all keys up to its own (with `length` 6 and T 3, row 0 sees keys 0 to 6, row 2 all 9)
# and makes softmax of q·k/√K over them, times their values. Nine to fourteen lines.
#
# Query head h reads KV head h // G, G = H/KV. Copy no keys for that: it moves what the cache was to spare.
# The G queries of a KV head can stand side by side: `q.unflatten(1, (KV, G))` is (B, KV, G, T, K), and its
# `.flatten(2, 3)`, (B, KV, G·T, K), makes one product with keys (B, KV, S, K), by @ or einsum, which torch's
# counter knows. (Masks: `torch.ones(T, S, dtype=torch.bool, device=q.device)` and `.triu`.)

# %% nbgrader={"grade_id": "attend", "solution": true}
# %%exercise L15
import torch


def attend(memory, length, q, k, v):
    """Keep `k`, `v` in `memory`; what `q` makes of all values up to its own token: (B, H, T, K)."""
    (KV, T, K), S = k.shape[1:], length + k.shape[2]
    ### BEGIN SOLUTION
    memory[0, :, :, length:S], memory[1, :, :, length:S] = k, v
    keys, values = memory[:, :, :, :S]                             # (B, KV, S, K) each
    q = q.unflatten(1, (KV, -1)).flatten(2, 3)                     # (B, KV, G T, K)
    scores = q @ keys.mT / K**0.5                                  # (B, KV, G T, S)
    later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(length + 1)
    scores = scores.unflatten(2, (-1, T)).masked_fill(later, -torch.inf)     # (B, KV, G, T, S)
    y = scores.softmax(-1).flatten(2, 3) @ values                  # (B, KV, G T, K)
    return y.unflatten(2, (-1, T)).flatten(1, 2)                   # (B, H, T, K)
    ### END SOLUTION


# %%
check.attend(attend)

# %% [markdown]
# **Exercise 2: generate.** `cache = make(capacity)` gives a cache for so many tokens. Ask for as many as are
# ever looked at: is that all of the answer? `model.hidden_states(tokens, places, cache)` is (B, T, C) for
# `tokens` (B, T) at `places` (T,), and calls `cache.attend` in each layer. Then add T to `cache.length`,
# which no one does for you. `model.head` makes logits of rows. Greedy: `argmax`. Eight to twelve lines.

# %% nbgrader={"grade_id": "generate", "solution": true}
# %%exercise L15
import torch


@torch.no_grad()
def generate(model, prompt, n, make):
    """The n likeliest tokens, one after another, behind `prompt` (B, P): (B, n)."""
    ### BEGIN SOLUTION
    cache, new, made = make(prompt.shape[1] + n - 1), prompt, []
    for _ in range(n):
        places = torch.arange(cache.length, cache.length + new.shape[1])
        hidden = model.hidden_states(new, places, cache)           # (B, T, C)
        cache.length += new.shape[1]
        new = model.head(hidden[:, -1]).argmax(-1, keepdim=True)   # (B, 1)
        made.append(new)
    return torch.cat(made, 1)
    ### END SOLUTION


# %%
check.generate(generate)

# %% [markdown]
# ## 4. Read the real one
# `nanoinfra generate`. Which core runs when, and what would a step cost if the cache grew by `torch.cat`? And
# a part for CPUs, `PackedLinear`: what does it do with q, k and v, and why should that help decode the most?

# %%
print(*map(inspect.getsource, (real.KVCache, real._generate)), inspect.getmodule(PackedLinear).__doc__,
      *map(inspect.getsource, (PackedLinear, PackedInPort, pack_linears)), sep="\n")

# %% [markdown]
# ## 5. Measure, compare, explain
# FLOPs and bytes are *counted*, on the meta device, with your `attend`: `Traffic` sees what each operator is
# given of the weights and of the cache. Tokens/s are *timed*: your `attend`, packed weights, a cache that
# holds S tokens already, one core. A ceiling is no estimate, so they are not judged; an order is, below. (A
# little above it? Then the machine was busy when you measured β. Ten times? Then look at your formula.)

# %%
wrote, was_read = {kind: {} for kind in KINDS}, {}
for kind, config in CONFIGS.items():
    model = init_weights(Decoder(config), seed=0)
    pack_linears(model)
    for B in BATCHES:
        wrote[kind][B] = figures.time_tokens_per_second(model, attend, B, 1, S, REPEATS)
        if kind == "mha" and B in (1, 8):
            was_read[B] = figures.time_tokens_per_second(model, attend, B, P, P, REPEATS)
    measure(f"L15.kv_{kind}", counted, ExerciseKVCache(attend, config, 1, 1).memory.nbytes, "B")
for phase, T, total in (("prefill", P, P), ("decode", 1, S)):
    work, moved = figures.count_flops_and_reads(MHA, attend, 1, T, total)
    measure(f"L15.flops_{phase}", counted, work, "FLOPs")
    measure(f"L15.intensity_{phase}", counted, work / sum(moved.values()), "FLOPs/B")
measure("L15.flops_again", counted, again_flops(S), "FLOPs")
measure("L15.even", counted, moved["weights"] / moved["cache"], "sequences")
rates = {"prefill_1": was_read[1], "decode_1": wrote["mha"][1], "decode_8": wrote["mha"][8]}
for what, got in rates.items():
    measure(f"L15.{what}", lambda got=got: got)
beta = max(beta, *figures.measure_read_bandwidths(NBYTES).values())       # it may have been busy before
pi = max(pi, figures.measure_matmul_rate())
compare_predictions(list(check.PREDICTIONS), tolerance={f"L15.{what}": None for what in rates})

# %%
read, written = ({B: each.value for B, each in rates.items()} for rates in (was_read, wrote["mha"]))
pairs = (("prompts are read faster than answers are written", read[1], written[1]),
         ("8 sequences write more than 1", written[8], written[1]),
         ("8 over 1: writing gains more than reading", written[8] / written[1], read[8] / read[1]))
DisplayTable("MHA, tokens/s, timed", ("", "more", "less", ""), [
    (what, f"{more:,.4g}", f"{less:,.4g}", "pass" if more > less else "miss") for what, more, less in pairs])

# %% [markdown]
# **An answer.** The wall again, and your loop: FLOPs of a whole answer behind a prompt of 16. Dots: counted.

# %%
def answer_flops(n):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        generate(Decoder(MHA), torch.zeros(1, 16).long(), n,
                 lambda size: ExerciseKVCache(attend, MHA, 1, size))
    return counter.get_total_flops()


few, many = (1, 8, 24) if FAST else (1, 32, 64, 128), range(1, 129)
lines = {how: (many, [inference_cost.generation_flops(MHA, 16, n, how == "your cache") / 1e9 for n in many])
         for how in ("all tokens again", "your cache")}
dots = {"all tokens again": (few, [sum(map(again_flops, range(16, 16 + n))) / 1e9 for n in few]),
        "your cache": (few, [answer_flops(n) / 1e9 for n in few])}
ratio = dots["all tokens again"][1][-1] / dots["your cache"][1][-1]
draw.plot_curves(lines, dots, "tokens of the answer", "GFLOPs, all of them", log_scale=False,
                 title=f"what an answer costs; of {few[-1]} tokens {ratio:.0f} x as much without a cache")

# %% [markdown]
# **The batch.** Lines: the lower of both ceilings, for each kind; dashed, MHA's arithmetic. Dots: timed.

# %%
smooth = [2 ** (i / 8) for i in range(57)]
ceiling = inference_cost.max_tokens_per_second
lines = {kind.upper(): (smooth, [ceiling(config, B, 1, S, D, beta, pi) for B in smooth])
         for kind, config in sorted(CONFIGS.items())}                # in this order: MHA is orange below too
lines["arithmetic (MHA)"] = smooth, [ceiling(MHA, 1, 1, S, D, peak_flops=pi)] * len(smooth)
dots = {kind.upper(): (BATCHES, [each[B].value for B in BATCHES]) for kind, each in sorted(wrote.items())}
figures.throughput_over_batch(lines, dots, inference_cost.batch_size_where_cache_equals_weights(MHA, S, D),
                              f"writing at S = {S}, and two ceilings")

# %% [markdown]
# **The roofline.** The same calls by intensity, with their batch. Memory limits them left of the edge.

# %%
calls = {f"{kind.upper()} decode": [(CONFIGS[kind], B, 1, S, each.value) for B, each in wrote[kind].items()]
         for kind in ("mha", "mqa")}
calls["MHA prefill"] = [(MHA, B, P, P, each) for B, each in read.items()]
figures.roofline(calls, D, beta, pi, "under one roof: reading computes, writing fetches")

# %% [markdown]
# On an H100 (3.35 TB/s, 989 TFLOP/s in bfloat16, 80 GB) by the same formulas. Nothing here was run.

# %%
def served(name, config, S=2048, beta=3.35e12, pi=989e12, memory=80e9):
    own, kv = inference_cost.weight_bytes_read(config, 2), kv_cache_bytes_per_token(config, 2)
    fit = int((memory - 2 * parameter_count(config)) // (S * kv))
    one, full = (inference_cost.max_tokens_per_second(config, B, 1, S, 2, beta, pi) for B in (1, fit))
    return (name, f"{own / 1e9:.1f} GB", f"{kv / 1024:,.4g} KiB",
            f"{inference_cost.batch_size_where_cache_equals_weights(config, S, 2):.0f}",
            f"{fit:,}", f"{one:,.0f}", f"{full:,.0f}")


llama = ModelConfig(128256, 4096, 32, 32, 8, 128, 14336, 8192, tied=False)
DisplayTable("modelled: decode at 2048 tokens, on an H100",
             ("model", "weights read", "KV a token", "even", "sequences that fit", "tokens/s of 1", "of all"),
             [served("OPT-13B, MHA", ModelConfig(50272, 5120, 40, 40, 40, 128, 20480, 2048, family="opt")),
              served("Llama-3-8B, GQA", llama), served("the same with MQA", replace(llama, kv_heads=1)),
              served("SmolLM2-135M, GQA", ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192))])

# %% [markdown]
# **Explain.** Five sentences. (a) While caches are small, why is a decode's intensity about B/2 in float32,
# and a prefill's about P/2? What would bfloat16 change? (b) To what does MHA's line tend for many sequences,
# and MQA's? (c) Why do 8 prompts gain nearly nothing over one, and 8 answers much? (d) What limits the number
# of sequences in the last table, and what becomes of it if each gets room for 2048 and most answers are
# short? (e) Dots lie below their line, most of all at large batches: what does a call do that it leaves out?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) A weight of 4 bytes does 2 FLOPs for each token of the call: 2·B/4, and 2·P/4; with 2 bytes both double.
# (b) β/(S·kv): weights are shared by so many that only caches count. MQA's would be H times as high, so
# arithmetic ends it. (c) A prompt's P tokens share the weights already, right of the roof's edge. (d) Memory
# for caches; what is kept free for an answer that ends early serves no one, and lesson 16 cuts it into pages.
# (e) β is the best reading seen, a product's is slower; reading and computing overlap in part, so near the
# edge both add up; activations, softmax, norms, Python come on top.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# One slip each (a few of them where LESSON_FAST is set). Which would you notice in what the model says? Your
# own file, `work/L15.py`, is graded from a terminal in this project: `make grade L=15`.

# %%
mutants = collect_lesson_mutants("15")
for each in mutants[::5] if FAST else mutants:
    failure = each.check.report(each.variant).first_failure
    print(f"{each.check.name}: {each.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# The cache, not the weights, now fills the memory: pages waste less of it (lesson 16), GQA shares heads, MLA
# (DeepSeek-V2) keeps one small vector a token from which all heads make theirs, 8 or 4 bits halve it again.
# *Speculative decoding* fills the idle arithmetic: a small model guesses k tokens, and the large one checks
# them all in one call, a chunk.
#
# - Leviathan et al., *Fast inference from transformers via speculative decoding*, 2023.
# - DeepSeek-AI, *DeepSeek-V2*, 2024 (multi-head latent attention).
