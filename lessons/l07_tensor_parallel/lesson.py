# %% [markdown]
# # Lesson 07. Tensor and sequence parallelism
# **2019** · Shoeybi et al., *Megatron-LM: training multi-billion parameter language models using model
# parallelism* · **2022** · Korthikanti et al., *Reducing activation recomputation in large transformers*.
#
# **Needs** a CPU. **Time** 90 minutes. **Builds on** lesson 02 (what an all-reduce costs), 04 (what is kept).
#
# After this you can compute what each of t ranks that share one layer sends and keeps, in three variants,
# build the two sums that make it right, and say why the ranks that do it sit in one machine.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os

from lessons.l07_tensor_parallel import checks as check
from lessons.l07_tensor_parallel import figures
from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes
from nanoinfra.formulas.saved_activations import saved_activation_bytes
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, measure, median_of_times
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import last_prediction, predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel import tensor_parallel as tp
from nanoinfra.parallel.sequence_parallel import SequenceParallelRegion
from nanoinfra.parallel.tensor_parallel_decoder import TensorParallel

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
N, B, T, C, L, H, V = 4, 2, 16, 48, 2, 4, 253
CONFIG = ModelConfig(V, C, L, H, H, C // H, 4 * C, T, family="gpt2")
SECONDS, REPEATS = (0.12, 3) if FAST else (0.6, 3)                    # a layer forward and back, on one rank
INSIDE, BETWEEN = ((2e-4, 3.6e6), (4e-4, 9e5)) if FAST else ((1e-3, 7.2e5), (2e-3, 1.8e5))  # s, bytes/s
world = RankPool(N, timeout=120)

# %% [markdown]
# ## 1. The wall
# Data parallelism gives each rank sequences, a pipeline (lesson 06) gives it layers. Suppose even that all
# weights, gradients and moments lie on N ranks without one copy (lesson 08 does that). GPT-3, one sequence a
# rank, 16 bits; a layer's weights and gradients are whole while it computes. Forward, until 80 GB are full:

# %%
gpt3 = ModelConfig(51200, 12288, 96, 96, 96, 128, 4 * 12288, 2048, family="gpt2")


def fits(n, t=1, memory=80e9):
    """A row: n ranks, of which t share each layer."""
    states, layer = 16 * parameter_count(gpt3) / n, 4 * 12 * gpt3.width**2 / t
    sp = "gather" if t > 1 else "none"
    kept = saved_activation_bytes(gpt3, 1, gpt3.context, 2, tp=t, sp=sp) / gpt3.layers
    fit = int(max(0, memory - states - layer) // kept)
    verdict = "fits" if fit >= gpt3.layers else f"out of memory in layer {fit + 1} of {gpt3.layers}"
    gigabytes = (f"{size / 1e9:.1f} GB" for size in (states, layer, gpt3.layers * kept))
    return f"{n:,}", *gigabytes, f"{n // t * gpt3.context:,}", verdict

RANKS = (64, 512, 4096, 32768)
COLUMNS = ("ranks", "states", "layer at work", "kept for backward", "tokens in a step, at least", "")
DisplayTable("GPT-3 (modelled; lesson 04 counted such bytes)", COLUMNS, [fits(n) for n in RANKS])

# %% [markdown]
# More ranks do not help: one layer and one sequence are left, and neither is cut. Recompute makes room for a
# third more FLOPs. And N ranks take N sequences a step, in the last row 67 million tokens at least. Two
# ranks have to work on the *same* token.
#
# ## 2. Predict
# **The MLP**, y = GELU(x·A1)·A2. Cut A1 along its outputs: a rank has 4C/t hidden units, and their GELU needs
# no other rank. (Along inputs, x·A1 is a sum over ranks, and GELU of a sum is no sum of GELUs.) Cut A2 along
# its inputs, the same units: each rank has a part of a sum, and one all-reduce of (B, T, C) makes y: **g**.
# Backward, each rank has a part of x's gradient, and one all-reduce makes it whole: **f**. Attention is the
# same, with heads for units: q, k, v along outputs, o along inputs.
#
# **Kept.** Numbers a token, in float32 (lesson 04): two norms keep 2C + 4; what q, k and v read, and what up
# reads, 2C; q, k, v and o's input 4C, up's output and GELU's 8C; sdpa's log-sum-exp H. Which are cut?
#
# **Sequence parallel** (SP). Norms and sums need no other token. An all-reduce is a reduce-scatter and an
# all-gather: put the norm in between, and a rank has T/t tokens of it. What q, k, v and up read is gathered,
# whole: *keep* it for backward, or keep your tokens and *gather* again, one all-gather for each of the two.
#
# **The loss.** The head is cut along the vocabulary. Of a token, ranks exchange the largest logit, the sum of
# exponentials, and the target's logit: three all-reduces of float32, and (B, T, V) is nowhere.

# %%
region = 4 * B * T * C                                                # bytes of (B, T, C) in float32
print(f"t={N} ranks, {B=} {T=} {C=} {H=} {V=}, {L} layers; compute is {SECONDS:g} s a layer, divided by t")
for where, (alpha, beta) in {"inside a node": INSIDE, "between nodes": BETWEEN}.items():
    print(f"a wire {where}: alpha {alpha * 1e3:g} ms, beta {beta / 1e6:g} MB/s")

# %% [markdown]
# Commit ten numbers. For one layer on t = N ranks: its all-reduces, forward and backward; the bytes a rank
# sends for them (2(t−1)/t of each), and with *gather* ((t−1)/t of each); the bytes kept by one rank alone,
# then by each of N without, with *keep*, with *gather*. Of the model: the loss's payload, and the time of L
# layers without SP, on 2 ranks of one node, on 4 of two? `help(ring_collective_seconds)` has the formula.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L07.calls", <formula>, "calls")
# predict("L07.sent", <formula>, "B")           and "L07.sent_gather", "L07.loss"
# predict("L07.kept_one", <formula>, "B")       and "L07.kept_none", "L07.kept_keep", "L07.kept_gather"
# predict("L07.step_inside", <formula>, "s")    and "L07.step_between"
### BEGIN SOLUTION
predict("L07.calls", 4, "calls")
predict("L07.sent", 8 * (N - 1) / N * region, "B")
predict("L07.sent_gather", 10 * (N - 1) / N * region, "B")
norms, read, between = 2 * C + 4, 2 * C, 12 * C + H
for how, numbers in {"one": norms + read + between, "none": norms + read + between / N,
                     "keep": read + (norms + between) / N, "gather": (norms + read + between) / N}.items():
    predict(f"L07.kept_{how}", 4 * B * T * numbers, "B")
predict("L07.loss", 3 * 4 * B * T, "B")
for where, t, wire in (("inside", 2, INSIDE), ("between", 4, BETWEEN)):
    all_reduce = ring_collective_seconds("all_reduce", region, t, *wire)
    predict(f"L07.step_{where}", L * (SECONDS / t + 4 * all_reduce), "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# The real one's cut of this decoder, each matrix as it is stored: outputs down, inputs across.

# %%
def cuts():
    return TensorParallel(Decoder(CONFIG), Mesh(tp=N)).parameter_shards


figures.parameter_shard_map(world.run(cuts), parameter_shapes(CONFIG))

# %% [markdown]
# **Exercise 1: an MLP on t ranks.** `share` gives rank r = `axis.rank` of `axis.size` its r-th stretch of the
# D hidden units: of 6 on 2 ranks, rank 1 has rows 3, 4, 5 of `up` and `up_bias`, columns 3, 4, 5 of `down`,
# and `down_bias` whole. A part of a tensor is a view, which keeps all of it in memory: `.clone()` it. Then f
# and g. `all_reduce(x, axis)` overwrites x and returns it; x may be someone else's, so give it a clone. In
# `tensor_mlp`, where does `down_bias` come in? Eight to twelve lines.

# %% nbgrader={"grade_id": "mlp", "solution": true}
# %%exercise L07
import torch
import torch.nn.functional as F

from nanoinfra.distributed.comm import all_reduce


def share(up, up_bias, down, down_bias, axis):
    """This rank's part of each, as a tuple, of up (D, C), up_bias (D,), down (C, D), down_bias (C,)."""
    ### BEGIN SOLUTION
    def mine(x, dim):
        return x.chunk(axis.size, dim)[axis.rank].clone()
    return mine(up, 0), mine(up_bias, 0), mine(down, 1), down_bias
    ### END SOLUTION


class Enter(torch.autograd.Function):
    """The paper's f."""

    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):                                       # one gradient for x, None for axis
        ### BEGIN SOLUTION
        return all_reduce(grad.clone(), ctx.axis), None
        ### END SOLUTION


class Leave(torch.autograd.Function):
    """The paper's g."""

    @staticmethod
    def forward(ctx, y, axis):
        ### BEGIN SOLUTION
        return all_reduce(y.clone(), axis)
        ### END SOLUTION

    @staticmethod
    def backward(ctx, grad):
        ### BEGIN SOLUTION
        return grad, None
        ### END SOLUTION


def tensor_mlp(x, up, up_bias, down, down_bias, axis):
    """x (B, T, C) to y (B, T, C), both alike on all ranks; the weights are what `share` gave this rank."""
    ### BEGIN SOLUTION
    hidden = F.gelu(F.linear(Enter.apply(x, axis), up, up_bias))   # (B, T, D/t)
    return Leave.apply(F.linear(hidden, down), axis) + down_bias   # (B, T, C)
    ### END SOLUTION


# %%
check.share(share)

# %%
check.enter(Enter).show()
check.leave(Leave).show()
check.tensor_mlp(tensor_mlp)

# %% [markdown]
# **Exercise 2: a loss without logits.** This rank has columns `start`, `start + 1`, ... of the logits. The
# loss of a row is log Σ exp(z) − z[target], over all columns; take the row's largest logit off every z first,
# or exp overflows. Its gradient is softmax − onehot, of your columns. A target may be another rank's: gather
# column 0 there, times 0: all ranks make all calls. `all_reduce(x, axis, op="max")`. Ten lines, no autograd.

# %% nbgrader={"grade_id": "loss", "solution": true}
# %%exercise L07
def vocab_loss(logits, targets, start, axis):
    """(loss (R,), the same on all ranks; d loss / d logits (R, V/t)) of logits (R, V/t), targets (R,)."""
    ### BEGIN SOLUTION
    top = all_reduce(logits.max(1).values, axis, op="max")                   # (R,)
    z = logits - top[:, None]                                                # (R, V/t)
    total = all_reduce(z.exp().sum(1), axis)                                 # (R,)
    at = targets - start
    mine = (at >= 0) & (at < logits.shape[1])
    at = at.where(mine, 0)[:, None]                                          # (R, 1)
    score = all_reduce(z.gather(1, at)[:, 0] * mine, axis)                   # (R,)
    grad = (z.exp() / total[:, None]).scatter_add(1, at, -mine[:, None].to(z.dtype))
    return total.log() - score, grad
    ### END SOLUTION


# %%
check.vocab_loss(vocab_loss)

# %% [markdown]
# ## 4. Read the real one
# A region is a `TensorParallelRegion`, or with SP a `SequenceParallelRegion`. `_ColumnParallelLinear` calls
# its `gather_input`, `regather_input` and `reduce_input_grad`, `_ReduceFromRegion` its `reduce_output` and
# `gather_output_grad`. How many all-reduces would q, k and v have, each behind an f of its own? What does
# backward compute while the sum of x's gradient is under way? What if t does not divide T?

# %%
for it in (tp.row_parallel_linear, tp._ReduceFromRegion, tp._ColumnParallelLinear, tp.TensorParallelRegion,
           SequenceParallelRegion, TensorParallel.all_reduce_partial_grads):
    print(inspect.getsource(it))

# %% [markdown]
# ## 5. Measure, compare, explain
# A step of the real decoder, by the ledger, against `formulas/tensor_parallel.py`. Of GPT-2's biases, norms
# and position embeddings, what must ranks sum once a step with SP ("tp grads"), and why not without?

# %%
ways = {"one": (1, "none"), "two": (2, "none"), **{sp: (N, sp) for sp in ("none", "keep", "gather")}}
runs, lines = {how: world.run(figures.run_tensor_parallel_step, CONFIG, *way, B, T)[0]
               for how, way in ways.items()}, []
for how, (t, sp) in ways.items():
    for (op, tag), want in tp_collectives_per_step(CONFIG, t, B, T, sp=sp).items():
        sizes = [row.payload_bytes for row in runs[how][1] if (row.op, row.tag) == (op, tag)]
        got = len(sizes), sum(sizes)
        lines.append((f"{t} ranks, sp {sp}", f"{op}: {tag}", *(f"{n:,}" for n in (*want, *got)),
                      "pass" if want == got else "miss"))
print("losses:", *(f"{how} {loss:.6f}" for how, (loss, *_) in runs.items()))
DisplayTable("a step: formulas and ledger", ("", "", "calls", "bytes", "counted", "counted", ""), lines)

# %% [markdown]
# *Timed*: L real layers, which sleep for as long as an accelerator would compute, and an emulated wire. Nodes
# here have two ranks, so t = 4 pays the wire *between* them: a ring is as fast as its slowest link.

# %%
wires = {1: INSIDE, 2: INSIDE, 4: BETWEEN}
steps = {t: median_of_times(world.run(figures.time_emulated_layers, CONFIG, t, wire, SECONDS, B, T,
                                      REPEATS)[0])
         for t, wire in wires.items()}
layers = {how: [row for row in rows if row.tag == "layers"] for how, (_, rows, _) in runs.items()}
measure("L07.calls", counted, len(layers["none"]) / L, "calls")
measure("L07.sent", counted, sum(row.modelled_ring_bytes for row in layers["none"]) / L, "B")
measure("L07.sent_gather", counted, sum(row.modelled_ring_bytes for row in layers["gather"]) / L, "B")
for how in ("one", "none", "keep", "gather"):
    measure(f"L07.kept_{how}", counted, sum(runs[how][2]), "B")
measure("L07.loss", counted, sum(row.payload_bytes for row in runs["none"][1] if row.tag == "loss"), "B")
measure("L07.step_inside", lambda: steps[2])
measure("L07.step_between", lambda: steps[4])
compare_predictions(list(check.PREDICTIONS))

# %%
figures.saved_byte_bars({name: (runs[how][2], last_prediction(f"L07.kept_{how}")[0]) for name, how in
                         {"one rank": "one", "TP": "none", "TP + SP, keep": "keep",
                          "TP + SP, gather": "gather"}.items()},
                        f"what a layer keeps for backward on each of {N} ranks")

# %%
DisplayTable("GPT-3, eight ranks to a layer, SP with gather (modelled)", COLUMNS, [fits(n, 8) for n in RANKS])

# %% [markdown]
# **The cliff.** A rank computes 1/t of a layer, and sends 8(t−1)/t·BTC numbers: nearly as many for every t.
# So its time over that of compute alone is, latency apart, 1 + k(t−1), one k inside a node and another
# beyond. Tazi et al. timed 3.57 billion parameters on H100s, eight to a node. Take one k from their t = 2 and
# 4, the other from t = 16: what do the two say of 8 and 32? Blue is timed here, its line with latency.

# %%
published = {2: 363.7, 4: 345.5, 8: 279.5, 16: 158.1, 32: 92.7}       # teraFLOP/s of a GPU
k_in = (1 / published[4] - 1 / published[2]) / 2                      # 1/speed is linear in t - 1
alone = 1 / published[2] - k_in
k_out = (1 / published[16] - alone) / 15


def theirs(t):
    return 100 / published[2] / (alone + (k_in if t <= 8 else k_out) * (t - 1))


def ours(t):
    wait = ring_collective_seconds("all_reduce", region, t, *(INSIDE if t <= 2 else BETWEEN))
    return 100 / (1 + 4 * wait * t / SECONDS)


timed, h100 = ({t: 100 * L * SECONDS / t / step.value for t, step in steps.items()},
               {t: 100 * tf / published[2] for t, tf in published.items()})
figures.speed_over_tp_size({"emulated wire, nodes of 2": (2, timed, "predicted", ours),
                            "H100, nodes of 8 (100: t = 2)":
                            (8, h100, "by t = 2, 4, 16", theirs)},
                           "the speed of a rank that shares its layers")

# %% [markdown]
# **Explain.** Five sentences. (a) Why does more bandwidth *inside* a node not help t = 16? (b) Which of the
# four all-reduces could hide, and behind what (`_ColumnParallelLinear`)? Which cannot? (c) Sequence
# parallelism sends the bytes of an all-reduce: what memory does it save, and what do *keep* and *gather* pay?
# (d) The published t = 8 lies below the line: what else gets worse when a rank has an eighth of every matrix?
# (e) Two KV heads, eight ranks: who has which, and who sums their gradients (`kv_replica_axis`)?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) Every chunk of the ring passes its slowest link. (b) f's: the gradients of q, k, v's and up's weights
# need no sum and are computed meanwhile. g's cannot: what comes next reads the sum. (c) No longer t copies of
# the norms' inputs; *keep* still has t copies of what is gathered, *gather* sends a quarter more. (d) Thin
# matrices, at which a GPU is slower, and more latencies. (e) Four neighbours hold the same one, each for
# other query heads, and so a part of its gradient: sum over the four.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# One slip each (three of them where LESSON_FAST is set). Which would a loss curve show, which only a bill?

# %%
mutants = collect_lesson_mutants("07")
for mutant in mutants[8::22] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.check.name}: {mutant.name}\n    rejected by: {failure.criterion.name}")
    print(f"    {failure.text.splitlines()[0]}")
world.close()

# %% [markdown]
# ## 7. What came next
# Megatron (2021) made it a rule: tensor parallelism inside a node, pipelines between nodes, data parallelism
# around both (lesson 10). Long sequences cut attention along T as well (lesson 13), experts cut the MLP by
# tokens (lesson 14). In serving, t ranks read a layer's weights t times as fast: decoding's best axis.
#
# - Narayanan et al., *Efficient large-scale language model training on GPU clusters using Megatron-LM*, 2021.
# - Tazi et al., *The ultra-scale playbook: training LLMs on GPU clusters*, 2025 (the times above).
