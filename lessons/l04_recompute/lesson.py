# %% [markdown]
# # Lesson 04. Recompute instead of remember
# **2016** · Chen et al., *Training deep nets with sublinear memory cost*: activation checkpointing, also
# called gradient checkpointing or recomputation. Save little in the forward, compute the rest again.
# **2022** · Korthikanti et al., *Reducing activation recomputation in large transformer models*.
#
# **Needs** a CPU. **Time** 75 minutes. **Builds on** lesson 00 (FLOPs) and 01 (where the memory goes).
#
# After this you can compute, tensor by tensor, what a forward leaves in memory for backward, what two kinds
# of recomputation save of it, and what they cost in FLOPs.

# %%
# %load_ext nanoinfra.lab.exercise
import functools
import inspect
import os

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lessons.l04_recompute import checks as check
from lessons.l04_recompute.figures import saved_tensor_bars
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.lab.instruments.saved_activations import SavedActivations
from nanoinfra.lab.measure import counted, measure, median_of_times, timed
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.memory import recompute as real
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
B, T, C, L, H = (2, 48, 64, 4, 4) if FAST else (2, 320, 256, 8, 8)
V, K, F, REPEATS = 512, C // H, 4 * C, 2 if FAST else 5
CONFIG = ModelConfig(V, C, L, H, H, K, F, T, family="gpt2")
torch.set_num_threads(1)                     # one core: your browser keeps the others

# %% [markdown]
# ## 1. The wall
# GPT-2 small, 4 sequences, and a GPU of 24 GB. Weights, gradients and moments take 16 bytes a parameter. And
# each layer of forward leaves tensors behind that its backward will read. `SavedActivations` counts those, as
# autograd offers each to a hook. On the *meta* device tensors have shapes but no numbers, so any size fits
# here.

# %%
def forward(name, seq, memory=24e9):
    """A row of the table: layer after layer, until the memory is full."""
    with torch.device("meta"):
        model, verdict = Decoder(config_for_size(name, context=seq), "naive"), "fits"
        x = torch.zeros(4, seq, dtype=torch.long)
        x = model.embed_tokens(x, model.default_positions(x))
        states = 16 * parameter_count(model.config)
        with SavedActivations(model.parameters()) as kept:
            for i, block in enumerate(model.blocks, start=1):
                x = block(x)
                if states + kept.saved_bytes() > memory:
                    verdict = f"out of memory in layer {i} of {len(model.blocks)}"
                    break
    square = sum(t.untyped_storage().nbytes() for t in kept.saved_tensors() if t.shape[-2:] == (seq, seq))
    return f"{seq:,}", *(f"{n / 1e9:.1f} GB" for n in (states, kept.saved_bytes(), square)), verdict

DisplayTable("GPT-2 small, 4 sequences, float32, naive attention (counted)",
             ("T", "states", "kept for backward", "of that, T x T", ""),
             [forward("small", seq) for seq in (256, 512, 1024, 2048, 4096)[::4 if FAST else 1]])

# %% [markdown]
# Soon the states are the smaller part. What fills the memory is written in forward, read once in backward,
# and waits in between. None of it is *needed*: a layer's input is enough to compute it again. *Full*
# recompute keeps that alone. *Selective* throws away what is large and cheap: attention's T × T squares.

# %% [markdown]
# ## 2. Predict
# What does a layer of GPT-2 keep? Backward reads, parameters apart (each tensor counts once):
# - a product x·W: its input x, for W's gradient. q, k and v read the same x;
# - a LayerNorm: its input, and for each token the mean and 1/std;
# - scores q·kᵀ: q and k. The causal mask: T × T bools of a byte, one mask a layer, for all its heads and
#   sequences. Softmax: its *output*, T × T numbers for each head. The product with v: that again, and v;
# - GELU: its input. An addition, as of the residual: nothing.
#
# A layer is x + o(attention(norm(x))), then x + down(GELU(up(norm(x)))); F = 4C, H·K = C and numbers have d
# bytes: (a multiple of C, plus statistics)·B·T·d + squares. *Selective* runs the core again, from q, k, v to
# its output: which terms go? *Full* runs the layer again: one term stays.
#
# The price: a token's forward has 2 FLOPs for each of a layer's 12·C² entries and the head's C·V, and 4·T·C a
# layer for scores and values. Backward has twice that. Which of these does a strategy run once more?

# %%
print(f"GPT-2's kind, tied: {L=} {C=} {F=} {H=} {V=}; a step has {B=} {T=}; float32, d=4")

# %% [markdown]
# Commit six numbers: the bytes that the L layers keep with each strategy; the FLOPs of a whole step, head and
# all, with selective and with full recompute; and the time of a step with full recompute over one without.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L04.kept_none", <formula>, "B")              and "L04.kept_selective", "L04.kept_full"
# predict("L04.flops_selective", <formula>, "FLOPs")    and "L04.flops_full"
# predict("L04.time_full", <a ratio>, "x")
### BEGIN SOLUTION
numbers, square = 16 * C + 4, B * H * T * T * 4 + T * T
predict("L04.kept_none", L * (numbers * B * T * 4 + square), "B")
predict("L04.kept_selective", L * numbers * B * T * 4, "B")
predict("L04.kept_full", L * C * B * T * 4, "B")
layers, cores, head = L * (24 * C * C + 4 * T * C), L * 4 * T * C, 2 * C * V         # a token's forward
predict("L04.flops_selective", (3 * (layers + head) + cores) * B * T, "FLOPs")
predict("L04.flops_full", (3 * (layers + head) + layers) * B * T, "FLOPs")
predict("L04.time_full", (4 * layers + 3 * head) / (3 * (layers + head)), "x")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# One layer of this model, and every tensor that its forward leaves, in order, from the hook itself.

# %%
block, x = Decoder(CONFIG, "naive").blocks[0], torch.zeros(B, T, C, requires_grad=True)
with SavedActivations(block.parameters()) as now:
    y = block(x)                             # whose graph holds the tensors
names = ("norm 1's input", "mean", "1/std", "input of q, k and v", "k", "q", "mask", "softmax's output", "v",
         "o's input", "norm 2's input", "mean", "1/std", "up's input", "GELU's input", "GELU's output")
saved_tensor_bars(now.saved_tensors(), names, T,
                  "what one layer keeps: input (green), T x T (orange), the rest")

# %% [markdown]
# **Exercise 1: bytes kept.** The formula, for any GPT-2: fewer KV heads than heads (k and v have KV·K
# numbers a token), H·K other than C, d = 4 or 8. For `check.CONFIG` (L=5, C=24, H=KV=4, K=6, F=40), B = 3,
# T = 7 and d = 4: 127,925 bytes with "none", 115,920 "selective", 10,080 "full". Five to ten lines.

# %% nbgrader={"grade_id": "kept_bytes", "solution": true}
# %%exercise L04
def kept_bytes(config, batch, seq, d, how):
    """Bytes that autograd keeps of a forward through all layers; `how`: "none", "selective" or "full"."""
    C, L, F = config.width, config.layers, config.hidden
    H, KV, K = config.heads, config.kv_heads, config.head_dim
    ### BEGIN SOLUTION
    if how == "full":
        return L * batch * seq * C * d
    norms, mlp = 2 * (C + 2), C + 2 * F                            # input, mean, 1/std; up's, GELU's, down's
    attention = C + (H + 2 * KV) * K + H * K                       # its input; q, k, v; o's input
    squares = batch * H * seq * seq * d + seq * seq                # softmax, and the mask
    return L * (batch * seq * (norms + attention + mlp) * d + (squares if how == "none" else 0))
    ### END SOLUTION

# %%
check.kept_bytes(kept_bytes)

# %% [markdown]
# **Exercise 2: recompute.** An autograd function: `forward` may keep things on `ctx`, `backward` gets the
# gradient of the output and returns one for each argument of `apply` (None where there is none).
# - Forward runs without grad, so it keeps nothing of itself. `ctx.save_for_backward(x)` keeps x; read it
#   back as `ctx.saved_tensors`. `fn` and `rest` may hang on `ctx`.
# - Backward takes x out of its graph (`x = x.detach().requires_grad_()`), runs `fn` on it again under
#   `torch.enable_grad()`, and calls `torch.autograd.backward(out, upstream)`: parameters get their gradients
#   there, and x its own in `x.grad`.
# - *Dice.* Dropout must drop the same numbers twice. Keep `torch.get_rng_state()` (5 KB a call, which
#   `SavedActivations` does not count), set it back for the second run, and leave the caller's dice alone:
#   `torch.random.fork_rng(devices=[])` is a context that does.
# - *The trap.* Where x needs no gradient (frozen embeddings), autograd would never call backward, and the
#   parameters inside learn nothing. Unless another argument of `apply` needs one: the `anchor`.
#
# `fn(x, *rest)` gives one tensor; `rest` needs no gradients. Ten to fifteen lines.

# %% nbgrader={"grade_id": "recompute", "solution": true}
# %%exercise L04
import torch


def recompute(fn, x, *rest):
    """`fn(x, *rest)` with the same gradients, keeping `x` alone; backward runs `fn` again."""
    anchor = None
    ### BEGIN SOLUTION
    anchor = torch.zeros((), requires_grad=True)
    ### END SOLUTION
    return Recompute.apply(fn, anchor, x, *rest)

class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, anchor, x, *rest):
        ### BEGIN SOLUTION
        ctx.fn, ctx.rest, ctx.dice = fn, rest, torch.get_rng_state()
        ctx.save_for_backward(x)
        return fn(x, *rest)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, upstream):
        ### BEGIN SOLUTION
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.dice)
            out = ctx.fn(x, *ctx.rest)
        torch.autograd.backward(out, upstream)
        return None, None, x.grad, *(None for _ in ctx.rest)
        ### END SOLUTION

# %%
check.recompute(recompute)

# %% [markdown]
# ## 4. Read the real one
# The trainer's `--recompute`. What does it do that yours leaves out? And `apply`: why does it wrap
# `block.forward`, and not the block? (Think of hooks that fetch a layer's weights when it is called.)

# %%
print(inspect.getsource(real))

# %% [markdown]
# ## 5. Measure, compare, explain
# Full recompute with your function, selective with the trainer's. Bytes are counted by the hook, FLOPs by
# torch's counter, which sees every product on its way to the kernel; times alternate, with and without.

# %%
tokens = torch.arange(B * T).view(B, T) % V
def model_of(how):
    model = init_weights(Decoder(CONFIG, "naive"), seed=0)
    for block in model.blocks if how == "full" else ():
        block.forward = functools.partial(recompute, block.forward)
    return model if how == "full" else real.apply_activation_checkpointing(model, how)

def step(model):
    model(tokens).square().mean().backward()

def kept(how):
    x, blocks = torch.zeros(B, T, C, requires_grad=True), model_of(how).blocks
    with SavedActivations(blocks.parameters()) as now:
        _y = functools.reduce(lambda x, block: block(x), blocks, x)
    return counted(now.saved_bytes(), "B")

def flops(how):
    with FlopCounterMode(display=False) as counter:
        step(model_of(how))
    return counted(counter.get_total_flops(), "FLOPs")

def slower(how):
    models = model_of("none"), model_of(how)
    pairs = [[timed(functools.partial(step, model), 1).value for model in models] for _ in range(REPEATS)]
    return median_of_times([with_it / without for without, with_it in pairs], "x")

for how in check.HOW:
    measure(f"L04.kept_{how}", kept, how)
for how in ("selective", "full"):
    measure(f"L04.flops_{how}", flops, how)
measure("L04.time_full", slower, "full")
compare_predictions(list(check.PREDICTIONS), tolerance={"L04.time_full": None})

# %% [markdown]
# A whole step, operator by operator: all that is held, logits and gradients too, but for the weights. (The
# rise towards the end is gradients piling up.)

# %%
def memory_over_time():
    picture, axes = draw.new_figure(8.6, 4.2, "memory during one step, dots where backward begins (counted)")
    for colour, how in zip((draw.RED, draw.ORANGE, draw.BLUE), check.HOW):
        model = model_of(how)
        with LiveTensorBytes(mark_operators=True) as storages:
            out = model(tokens).square().mean()
            begin = len(storages.marks) - 1
            out.backward()
        held = [size / 1e6 for _, size in storages.marks]
        axes.plot(held, color=colour, label=f"{how}: {max(held):,.1f} MB at most", linewidth=1.8)
        axes.plot(begin, held[begin], "o", color=colour, markeredgecolor="white", zorder=3)
    axes.set(xlabel="operators run", ylabel="MB held", ylim=(0, None))
    axes.legend(fontsize=10, frameon=False)
    return picture

memory_over_time()

# %% [markdown]
# The teeth are layers at work: what a layer would have kept is there for a moment. Chen et al. recompute
# *segments* of k layers: L/k inputs are kept, but k layers work at a time. With I the bytes of an input and W
# what a layer keeps by itself, the peak is L/k·I + k·W − I: the first norm reads the kept input itself. Which
# k is best? For the layers of GPT-2 xl, and of a net of 2016, tanh(W·x). There W = I, and nothing is
# subtracted, L/k·I + k·I: a layer keeps its output, not its input.

# %%
def peaks(layers, x):
    """Bytes kept at the worst moment, in inputs, for each k: segments of k layers, with your `recompute`."""
    def segment(x, some):
        return functools.reduce(lambda x, layer: layer(x), some, x)
    for k in ks:
        with SavedActivations(layers.parameters()) as kept:
            y = x
            for i in range(0, len(layers), k):
                y = recompute(segment, y, list(layers)[i:i + k])
            y.sum().backward()
        yield kept.peak_bytes / x.nbytes

gpt = config_for_size("small" if FAST else "xl")
ks = [k for k in range(1, gpt.layers + 1) if gpt.layers % k == 0]
with torch.device("meta"):
    chain = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(max(ks)))
    blocks, x = Decoder(gpt, "naive").blocks, torch.zeros(1, gpt.context, gpt.width)
    points = {"GPT-2": (ks, [*peaks(blocks, x)]), "tanh(W·x)": (ks, [*peaks(chain, torch.zeros(9, 64))])}
W = kept_bytes(gpt, 1, gpt.context, 4, "none") / kept_bytes(gpt, 1, gpt.context, 4, "full")
N, smooth = max(ks), [max(ks) ** (i / 60) for i in range(61)]
lines = {"GPT-2": (smooth, [N / k + k * W - 1 for k in smooth]),
         "tanh(W·x)": (smooth, [N / k + k for k in smooth])}
picture = draw.plot_curves(lines, points, "layers in a segment, k", "peak, in inputs of a layer",
                           f"{N} layers in segments of k (a layer of GPT-2 keeps {W:.0f} inputs)")
picture.figure.axes[0].set_xticks(ks, [str(k) for k in ks])
picture.figure.axes[0].minorticks_off()
picture  # noqa: B018

# %% [markdown]
# **Explain.** Five sentences. (a) Why is the ratio of FLOPs below 4/3, and why is that of times another? (If
# the spread covers your prediction, say so.) (b) Which k is best for each net, by formula, and why did
# practice move from √L to every layer? (c) What does selective recompute save under a fused attention (SDPA,
# Flash), and why? (d) Compare what squares take, and cost, with the rest of a layer: why is selective the
# better bargain? (e) Your step fits. Recompute anyway?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) The head does not run twice: (4·layers + 3·head) / (3·layers + 3·head). Time has the operators without
# FLOPs as well, whose share in forward is another than in backward; here the spread may cover both. (b)
# L/k·I + k·W is least at √(L·I/W): 7 for tanh, where W = I. A layer of GPT-2 xl keeps 32 inputs: 1.2, so
# every layer. (c) Nothing: the fused kernel never writes the squares, and its own backward computes the
# scores again. (d) Squares are H·T/C inputs, 16 in xl at T = 1024, for 4·T·C FLOPs a token; the other 16
# inputs cost 24·C², nine times as many. (e) Only if the memory buys something: a larger micro-batch, less
# pipeline bubble, no tensor parallelism.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Recompute that is wrong by one slip each. Which train on and look right?

# %%
mutants = [m for m in collect_lesson_mutants("04") if m.check is check.recompute]
for mutant in mutants[::5] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# FlashAttention (lesson 11) made selective recompute a part of the kernel: squares never leave the cache.
# Tensor and sequence parallelism (07) divide what is kept, pipelines (06) multiply it by the micro-batches in
# flight, and offload (09) moves it to the host instead of computing it again.
#
# - Chen et al., *Training deep nets with sublinear memory cost*, 2016.
# - Korthikanti et al., *Reducing activation recomputation in large transformer models*, MLSys 2023.
