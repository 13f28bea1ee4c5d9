# %% [markdown]
# # Lesson 01. Where the memory goes, and mixed precision
# **2017** · Micikevicius et al., *Mixed precision training*. **2020** · Rajbhandari et al., *ZeRO*.
#
# **Needs** a CPU. **Time** 75 minutes. **Builds on** lesson 00: what a step costs.
#
# After this you can compute, to the byte, what a training step holds and when: weights, gradients, optimizer,
# activations. You can say what 16-bit numbers save, what they lose, and which two tricks give it back.

# %%
# %load_ext nanoinfra.lab.exercise
import copy
import inspect
import math
import os
from dataclasses import replace

import torch

from lessons.l01_memory import checks as check
from lessons.l01_memory import figures
from lessons.l01_memory.text_batches import text_batch
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.model_states import model_state_bytes
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.saved_activations import saved_activation_bytes
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.lab.measure import counted, measure
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.loss_scale import LossScale
from nanoinfra.train.optimizer import MixedPrecisionOptimizer

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
V, C, L, H, T, MEMORY = (512, 128, 2, 4, 64, 16e6) if FAST else (2048, 256, 4, 8, 256, 112e6)
CONFIG = ModelConfig(V, C, L, H, H, C // H, 4 * C, T, family="gpt2")       # its bytes are counted
SMALL = ModelConfig(128, 64, 2, 4, 4, 16, 256, 64, family="gpt2")          # this one is trained
FIRST, LAST, EVERY = (20, 20, 5) if FAST else (200, 120, 10)               # its steps at two learning rates
torch.set_num_threads(1)

# %% [markdown]
# ## 1. The wall
# `LiveTensorBytes` counts the bytes of all live tensors, even of those that only autograd holds. Here it is
# an accelerator with little memory: the operator whose result does not fit fails. Two training steps each.

# %%
class Device(LiveTensorBytes):
    def record_mark(self, label):
        super().record_mark(label)
        if self.live_bytes() > MEMORY:
            raise MemoryError(f"out of memory in {label}")

def loss_of(model, x, y, count):
    return linear_cross_entropy(model.hidden_states(x), model.head.weight, y, count)

def adam(model, lr):
    """Lesson 00's optimizer in the model's own dtype: an update, which also forgets the gradients."""
    torch_adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=check.BETAS, weight_decay=0, fused=True)
    return lambda: (torch_adam.step(), torch_adam.zero_grad())

def two_steps(dtype, B):
    with Device(mark_operators=True) as device:
        try:
            model, tokens = Decoder(CONFIG).to(dtype), torch.zeros(2, B, T, dtype=torch.long)
            update = adam(model, lr=1e-3)
            for _ in range(2):
                loss_of(model, *tokens, B * T).backward()
                update()
            return f"{device.peak_bytes / 1e6:.0f} MB at most"
        except MemoryError as failure:
            return str(failure)

DisplayTable(f"{parameter_count(CONFIG):,} parameters, T = {T}, a device with {MEMORY / 1e6:.0f} MB",
             ("sequences", "float32", "all in bfloat16"),
             [(f"B = {B}", two_steps(torch.float32, B), two_steps(torch.bfloat16, B)) for B in (1, 2, 4, 8)])

# %% [markdown]
# Half the bytes a number, and twice as much fits. Why not just do that? We train on the source of Python's
# `inspect`, byte by byte: most of the way in float32, then the end, at a small learning rate, in either.

# %%
def go_on(model, step, steps, first):
    """`step(loss)` for each batch from the `first`. Returns (steps done, held-out losses)."""
    curve = {}
    for i in range(1, steps + 1):
        # a micro-batch of a step of 2**19 tokens (section 3)
        step(loss_of(model, *text_batch(first + i), 2**19))
        if i % EVERY == 0:
            curve[i] = loss_of(model, *text_batch(0, B=16), 16 * 64).item()
    return list(curve), list(curve.values())

def end(name, dtype, make_step):
    model = copy.deepcopy(trained).to(dtype)
    _steps, nats = ends[name] = go_on(model, make_step(model, 1e-5), LAST, first=1000)
    still = sum((p == q.to(dtype)).sum() for p, q in zip(model.parameters(), trained.parameters()))
    share = still / parameter_count(SMALL)
    print(f"{name}: loss {nats[0]:.4f} to {nats[-1]:.4f}, {share:.0%} of weights unmoved")

def plain(model, lr):
    update = adam(model, lr)
    return lambda loss: (loss.backward(), update())

trained, ends = init_weights(Decoder(SMALL), seed=0), {}
go_on(trained, plain(trained, 3e-3), FIRST, first=0)
end("float32", torch.float32, plain)
end("all in bfloat16", torch.bfloat16, plain)
B, psi, START = 4, parameter_count(CONFIG), 2.0**36                     # for the predictions
loss_of(trained, *text_batch(0), 2**19).backward()
g = max(p.grad.abs().max().item() for p in trained.parameters())
print(f"{psi=:,} {B=} {T=} {C=} {H=} START=2^{math.log2(START):g} g=2^{math.log2(g):.2f}")

# %% [markdown]
# All in bfloat16 it hardly moves. A bfloat16 has 8 significant bits: next to a weight of 0.02 the grid is
# 2⁻¹³ ≈ 12·10⁻⁵ wide. Adam moves by about the learning rate, 10⁻⁵, and each such update is rounded away.
#
# ## 2. Predict
# **Masters.** Compute with 16-bit weights, and get 16-bit gradients. The optimizer keeps a float32 *master*
# of each weight beside Adam's two float32 moments, moves the master, and rounds it into the model's weight.
#
# **Activations.** Backward of x·W reads x, so forward keeps it (W is there anyway). In a layer of GPT-2,
# - each of two LayerNorms keeps its input, C wide, and a mean and a 1/deviation for each token;
# - q, k and v read one tensor, kept once; o, up (C to 4C) and down (4C to C) keep what they read, too;
# - fused attention keeps q, k, v and its output (the tensor that o reads), and for each of H heads and each
#   token one number that is always float32. GELU keeps its input. Additions keep nothing.
#
# **A scale.** float16 has 11 significant bits, but ends at 65,504 and at 2⁻²⁴. So the *loss* is multiplied
# by a power of two, and every gradient with it. If one becomes infinite, the step is skipped and the scale
# halved. From START, far too high, how many tries are skipped until a batch of largest gradient g passes?
#
# Commit four numbers: the bytes of weights, gradients and optimizer in mixed precision; what one layer keeps
# of B sequences of T tokens, in float32 and in bfloat16; and the tries skipped. The letters stand above.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L01.states", <formula>, "B")             and "L01.layer_float32", "L01.layer_bfloat16"
# predict("L01.skipped", <formula>, "steps")
### BEGIN SOLUTION
numbers = (2 + 1 + 3 + 1 + 1 + 4 + 4) * C + 2 * 2    # norms; inputs of qkv; qkv; inputs of o, up, GELU, down
predict("L01.states", (2 + 2 + 4 + 4 + 4) * psi, "B")
predict("L01.layer_float32", B * T * (4 * numbers + 4 * H), "B")
predict("L01.layer_bfloat16", B * T * (2 * numbers + 4 * H), "B")
predict("L01.skipped", math.ceil(math.log2(START * g / 65504)), "steps")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# GPT-2 xl, by such formulas (modelled): 16 bytes a parameter, and 16 again. What does mixed precision save?

# %%
xl, psi_xl = config_for_size("xl"), parameter_count(config_for_size("xl"))
rows = {"float32": model_state_bytes(psi_xl),
        "all in bfloat16": {kind: held // 2 for kind, held in model_state_bytes(psi_xl).items()},
        "mixed": model_state_bytes(psi_xl, "bfloat16"),
        "mixed, gradients\nsummed in float32": model_state_bytes(psi_xl, "bfloat16", grad_bytes=4)}
for name, row in rows.items():
    row |= {"m": row.pop("exp_avg"), "v": row.pop("exp_avg_sq"),           # Adam's two moments
            "activations": saved_activation_bytes(xl, 4, 1024, 4 if name == "float32" else 2)}
figures.stacked_byte_bars(rows, "GPT-2 xl, a step of 4 x 1024 tokens: bytes by kind")

# %% [markdown]
# **Exercise 1: Adam with masters.** For a gradient g, in step t = 1, 2, ...: m ← β₁m + (1−β₁)g and
# v ← β₂v + (1−β₂)g², then w ← w − lr · m̂ / (√v̂ + ε), where m̂ = m / (1−β₁ᵗ) and v̂ = v / (1−β₂ᵗ). Here g
# is `factor` times `p.grad`, in float32. Before the first step m = v = 0, and the master is the weight. Work
# under `torch.no_grad()`, and end with `p.copy_(master)`. Eight to twelve lines.

# %% nbgrader={"grade_id": "adam_step", "solution": true}
# %%exercise L01
import torch


def adam_step(params, state, lr, factor=1.0, betas=(0.9, 0.95), eps=1e-8):
    """Moves 16-bit weights in place: `params` is {name: p}, each p with its 16-bit p.grad.

    `state` is {} at first; whatever must survive until the next step goes into it.
    """
    ### BEGIN SOLUTION
    t = state["t"] = state.get("t", 0) + 1
    with torch.no_grad():
        for name, p in params.items():
            if t == 1:
                zeros = torch.zeros_like(p, dtype=torch.float32)
                state[name] = p.float(), zeros, zeros.clone()
            master, m, v = state[name]
            grad = p.grad.float() * factor
            m.lerp_(grad, 1 - betas[0])
            v.lerp_(grad * grad, 1 - betas[1])
            master -= lr * m / (1 - betas[0]**t) / ((v / (1 - betas[1]**t)).sqrt() + eps)
            p.copy_(master)
    ### END SOLUTION

# %%
check.adam_step(adam_step)

# %% [markdown]
# Now float16. These are the gradients that backward hands from module to module, of one micro-batch in a step
# of 2¹⁹ tokens (GPT-3's were larger), as they are and times 2¹⁶.

# %%
passed, model = [], copy.deepcopy(trained)
for module in model.modules():
    module.register_forward_hook(lambda _, __, out: out.register_hook(passed.append) and None)
loss_of(model, *text_batch(0), 2**19).backward()
sizes = torch.cat([grad.flatten() for grad in passed])
figures.float16_histogram({"as they are": sizes, "times 2^16": sizes * 2**16},
                          "gradients and float16's range")

# %% [markdown]
# **Exercise 2: a scale that finds its size.** Backward of loss · scale. The norm of *all* gradients, over the
# scale, is the true norm; take it in float32 (`torch.linalg.vector_norm(..., dtype=torch.float32)`). If it is
# finite, call `move(factor)`: the one factor that undoes the scale *and* clips the true norm to `limit`.
# If not, skip: halve the scale and start counting good steps again; after
# `grow_after` good steps in a row double it, and count anew. Either way set each `p.grad = None`.

# %% nbgrader={"grade_id": "scaled_step", "solution": true}
# %%exercise L01
def scaled_step(loss, params, scale, limit, move):
    """Returns True if it moved, False if it skipped. `params` as in exercise 1; `limit` of the 2-norm.

    `scale` is {"value": 65536.0, "good": good steps since it last changed, "grow_after": 2000}, kept here.
    """
    ### BEGIN SOLUTION
    (loss * scale["value"]).backward()
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item() / scale["value"]
    moved = norm < float("inf")                                    # False for nan, too
    scale["good"] = scale["good"] + 1 if moved else 0
    if moved:
        move(limit / max(norm, limit) / scale["value"])
    if not moved or scale["good"] == scale["grow_after"]:
        scale["value"], scale["good"] = scale["value"] * (2 if moved else 0.5), 0
    for p in params.values():
        p.grad = None
    return moved
    ### END SOLUTION

# %%
check.scaled_step(scaled_step)

# %% [markdown]
# ## 4. Read the real one
# nanoinfra's optimizer is torch's fused one on such masters; its scale is a class that knows no tensor. Where
# do gradients become float32 here, for how long, and what does that cost?

# %%
print(*map(inspect.getsource, (MixedPrecisionOptimizer, LossScale)), sep="\n\n")

# %% [markdown]
# ## 5. Measure, compare, explain
# All four are *counted*: on the storages that are alive, and on the tries of your `scaled_step`.

# %%
def states():
    with LiveTensorBytes() as storages:
        model, state = Decoder(CONFIG).bfloat16(), {}
        loss_of(model, *torch.zeros(2, B, T, dtype=torch.long), B * T).backward()
        adam_step(dict(model.named_parameters()), state, lr=1e-3)
        return counted(storages.live_bytes(), "B")

def layer(dtype):                            # what forward leaves behind in two layers, less in one
    held, tokens = [], torch.zeros(B, T, dtype=torch.long)
    for model in (Decoder(replace(CONFIG, layers=n)).to(dtype) for n in (1, 2)):
        with LiveTensorBytes() as storages:
            loss = loss_of(model, tokens, tokens, B * T)           # holds the graph, which holds the rest
            held.append(storages.live_bytes() - loss.nbytes)
    return counted(held[1] - held[0], "B")

def skipped():
    model, scale = copy.deepcopy(trained).half(), {"value": START, "good": 0, "grow_after": 2000}
    for tries in range(64):
        loss = loss_of(model, *text_batch(0), 2**19)
        if scaled_step(loss, dict(model.named_parameters()), scale, 1.0, move=lambda factor: None):
            return counted(tries, "steps")

measure("L01.states", states)
measure("L01.layer_float32", layer, torch.float32)
measure("L01.layer_bfloat16", layer, torch.bfloat16)
measure("L01.skipped", skipped)
compare_predictions(list(check.PREDICTIONS))

# %% [markdown]
# **Over a step.** The bytes alive after each operator of a step. At one moment both curves are at 16Ψ: all
# gradients are there, and no activation. The top is elsewhere. Why does mixed precision start above float32?

# %%
def life(dtype, optimizer):
    """Bytes after each operator of forward, backward and update, in the second step."""
    with LiveTensorBytes(mark_operators=True) as storages:
        model, tokens = Decoder(CONFIG).to(dtype), torch.zeros(2, B, T, dtype=torch.long)
        loss, update = [], optimizer(model, 1e-5)
        acts = lambda: loss.append(loss_of(model, *tokens, B * T)), lambda: loss.pop().backward(), update
        return [figures.bytes_after_each_operator(storages, act) for act in acts * 2][3:]

def mixed(model, lr):
    params, state = dict(model.named_parameters()), {}
    return lambda: (adam_step(params, state, lr), model.zero_grad())

figures.bytes_over_step({"float32": life(torch.float32, adam),
                         "mixed, your Adam": life(torch.bfloat16, mixed)},
                        ("forward", "backward", "update"), ("16 bytes a parameter", 16 * psi),
                        f"a training step of {psi / 1e6:.2g} M parameters, B = {B}, T = {T}")

# %% [markdown]
# **Does it train?** The end once more, with your functions. The scale starts at 2³², for float16 too high.

# %%
def scaled(model, lr):
    params, state, scale = dict(model.named_parameters()), {}, {"value": 2.0**32, "good": 0, "grow_after": 30}
    return lambda loss: scaled_step(loss, params, scale, 1.0, lambda f: adam_step(params, state, lr, f))

end("bfloat16, masters", torch.bfloat16, scaled)
end("float16, masters", torch.float16, scaled)
figures.loss_curves(ends, "the end of training" + ", too short to rank the lower three" * FAST)

# %% [markdown]
# **Explain.** Four sentences. (a) Mixed precision has 16 bytes a parameter like float32: what does it save?
# (b) An update of 10⁻⁵ does not reach the 16-bit weight. How do the masters help? (c) Why is the scale a
# power of two? (d) Why does bfloat16 need no scale, and masters all the more?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 4}
# <!-- ### BEGIN SOLUTION -->
# (a) Half of the activations, and of the bytes that products read; time, where units are faster in 16 bits.
# (b) Updates add up in the master, and show once they pass half a gap. (c) It changes the exponent alone:
# nothing is rounded. (d) It has float32's exponents, so gradients do not vanish; but three significant bits
# fewer than float16, so more updates do.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Mixed precision that is wrong by one slip each. Which of them would a loss curve have shown you?

# %%
for mutant in collect_lesson_mutants("01")[:: 5 if FAST else 1]:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# bfloat16 (TPUs, then GPUs from 2020) made the scale unnecessary; 8-bit floats brought it back, one a tensor
# or block. Activations are computed again in backward (lesson 04); 16Ψ is cut over ranks: ZeRO (lesson 08).
#
# - Micikevicius et al., *Mixed precision training*, ICLR 2018.
# - Korthikanti et al., *Reducing activation recomputation in large transformer models*, 2022, section 4.
