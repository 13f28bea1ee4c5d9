# %% [markdown]
# # Lesson 03. Data parallelism: naive, buckets, overlap
# **2020** · Li et al., *PyTorch distributed: experiences on accelerating data parallel training*.
#
# **Needs** a CPU. **Time** 75 minutes. **Builds on** lesson 02: what an all-reduce costs.
#
# After this you can compute how many calls and bytes a data-parallel step sends, how long it waits for them,
# how much of that hides behind backward, and why gradients are divided by *one* number.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os
import time
from math import ceil, prod

import torch
from torch.nn.functional import cross_entropy

from lessons.l03_data_parallel import checks as check
from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.distributed import comm
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.parameters import block_parameter_shapes
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.emulated_compute import emulate_compute_time
from nanoinfra.lab.measure import counted, measure, median_of_times
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.parallel.data_parallel import DataParallel
from nanoinfra.parallel.pipeline.simulator import SimulatedTask, simulate_tasks

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
N, L, REPEATS = (4, 3, 1) if FAST else (4, 4, 3)      # ranks, layers, and trials to take the median of
ALPHA, BETA = (1e-3, 8e6) if FAST else (4e-3, 2e6)    # the wire: s a message, bytes/s
SEQUENCES, SECONDS = 8, 0.01 if FAST else 0.04        # in a step; of backward, a sequence and layer
CONFIG = ModelConfig(vocab=61, width=32, layers=L, heads=4, kv_heads=2, head_dim=8, hidden=88, context=16)
world = RankPool(N, emulated_links={"dp": (ALPHA, BETA)}, timeout=120)

# %% [markdown]
# The wire is emulated, as in lesson 02, and so are the accelerators: each layer *sleeps* for as long as one
# would compute, in proportion to its sequences. So your cores are free, and times can be predicted. Weights,
# tokens and gradients are real. Embedding and last norm are frozen, which leaves L layers of equal size.

# %%
def sleepy_model():
    """The same decoder on every rank, and a list that collects (begin, end) of each layer's backward."""
    model = init_weights(Decoder(CONFIG), seed=0)
    model.requires_grad_(False).blocks.requires_grad_(True)
    return model, emulate_compute_time(model.blocks, SECONDS)


def share(axis):
    """This rank's part of the step: x, y (B/N, T). Sequences have 2 to 14 valid targets; -100 is none."""
    x, y = torch.randint(CONFIG.vocab, (2, SEQUENCES, 16), generator=torch.Generator().manual_seed(0))
    for i in range(SEQUENCES):
        y[i, 2 + 2 * i % 14:] = -100
    return x[axis.rank::axis.size], y[axis.rank::axis.size]


def trial(gradients, n, *args, micro_batches=1):
    """Runs inside each rank: what it saw in each repeat. N / n groups of n ranks do the same side by side."""
    mesh, trials = Mesh(dp=n, pp=N // n), []
    for _ in range(REPEATS):
        (model, naps), parts = sleepy_model(), [part.chunk(micro_batches) for part in share(mesh.dp)]
        comm.barrier(mesh.dp)
        mesh.comm_log.take_records()
        begin = time.monotonic()
        grads = gradients(model, list(map(Batch, *parts)), mesh.dp, *args)
        seconds, rows = time.monotonic() - begin, check.gradient_rows(mesh.comm_log.take_records())
        trials.append({"step": seconds, "wait": sum(row.wait_seconds for row in rows), "rows": rows,
                       "naps": naps,
                       "flat": torch.cat([grad.flatten() for grad in grads.values()])})
    return trials


def least(results, what):
    """The least of the ranks: the one that comes last waits for the wire alone, the others for it too."""
    return median_of_times([min(one[what] for one in repeat) for repeat in zip(*results)])

# %% [markdown]
# ## 1. The wall
# The plain way: each rank takes the mean loss of its own sequences, and after backward every gradient is
# averaged, one all-reduce a parameter. Compare with one rank that has all the sequences.

# %%
def naive_gradients(model, batches, axis):
    for batch in batches:
        (cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten()) / len(batches)).backward()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: comm.all_reduce(p.grad, axis) / axis.size for name, p in params.items()}


runs, walls = {n: world.run(trial, naive_gradients, n) for n in (1, 2, N)}, []
alone = runs[1][0][0]["flat"]
for n, results in runs.items():
    walls.append((str(n), *(f"{least(results, what).value * 1e3:.0f} ms" for what in ("step", "wait")),
                  f"{(results[0][0]['flat'] - alone).norm() / alone.norm():.0%}"))
DisplayTable("the plain way", ("ranks", "step", "of that, waiting", "gradient off by"), walls)

# %% [markdown]
# Two walls at once. Compute shrinks with every rank, but each of the many calls pays the latency, and the
# wait eats what the ranks gain. And the gradient is another one: a rank whose targets are mostly padding
# counts as much as a full one. That is a mean of means. Adam hides it well; it has lived in large trainers.

# %% [markdown]
# ## 2. Predict
# **Divide once.** The loss of a step is a sum over all valid targets, over their number *on all ranks*. With
# that number known before backward, gradients are summed, over micro-batches and ranks, and nothing else.
#
# A layer has P parameters (tensors), S bytes of gradients, C seconds of backward. An all-reduce of s bytes
# takes t(s) = 2(N−1)·α + 2(N−1)/N·s/β on the ring, and the wire carries one at a time.
#
# - *Each*: one call a parameter, after backward. Nothing hides.
# - *Buckets*: the gradients of a layer travel in one flat tensor. The same bytes, fewer latencies.
# - *Overlap*: a bucket leaves when its last gradient is there, while the layers below it still compute, each
#   for longer than t(S). Which bucket has nothing to hide behind?
#
# With gradient accumulation, only the last micro-batch lets gradients leave: a step sends its bytes once.

# %%
P, C = len(block_parameter_shapes(CONFIG)), SECONDS * SEQUENCES / N
S = sum(4 * prod(shape) for shape in block_parameter_shapes(CONFIG).values())          # float32
print(f"{N=} {L=} {P=} S={S:,} B, alpha {ALPHA * 1e3:g} ms, beta {BETA / 1e6:g} MB/s, {C=:g} s, "
      f"t(S) {ring_collective_seconds('all_reduce', S, N, ALPHA, BETA) * 1e3:.1f} ms")

# %% [markdown]
# Commit six numbers for a step on N ranks: the calls of *each* and of *buckets*; the bytes that a rank hands
# to the all-reduces; and the seconds that the three ways wait.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L03.calls_each", <formula>, "calls")     and "L03.calls_buckets"
# predict("L03.bytes", <formula>, "B")
# predict("L03.wait_each", <formula>, "s")          and "L03.wait_buckets", "L03.wait_overlap"
### BEGIN SOLUTION
latency, transfer = 2 * (N - 1) * ALPHA, 2 * (N - 1) / N * S / BETA
predict("L03.calls_each", L * P, "calls")
predict("L03.calls_buckets", L, "calls")
predict("L03.bytes", L * S, "B")
predict("L03.wait_each", L * (P * latency + transfer), "s")
predict("L03.wait_buckets", L * (latency + transfer), "s")
predict("L03.wait_overlap", latency + transfer, "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# **Exercise 1: the right gradients.** Count the valid targets of the step over all ranks: an all-reduce of a
# small integer tensor. Run the micro-batches: `nats(...)` over that count, backward, and autograd adds up in
# `p.grad`. Then sum it over the ranks for each of `params`: `all_reduce(p.grad, axis)` works in place. A
# micro-batch may have no valid target at all. Five to eight lines.

# %% nbgrader={"grade_id": "summed", "solution": true}
# %%exercise L03
import torch.nn.functional as F

from nanoinfra.data.token_datasets import IGNORE_INDEX
from nanoinfra.distributed.comm import all_reduce


def summed_gradients(model, batches, axis):
    """{name: gradient of the step's mean loss}, on every rank; a batch has .tokens and .targets (B, T)."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ### BEGIN SOLUTION
    valid = sum((batch.targets != IGNORE_INDEX).sum() for batch in batches)
    count = all_reduce(valid, axis)                                # () int64
    for batch in batches:
        (nats(model, batch) / count).backward()
    for p in params.values():
        all_reduce(p.grad, axis)
    ### END SOLUTION
    return {name: p.grad for name, p in params.items()}


def nats(model, batch):
    """-sum log p over the valid targets."""
    return F.cross_entropy(model(batch.tokens).mT, batch.targets, ignore_index=IGNORE_INDEX, reduction="sum")


# %%
check.summed_gradients(summed_gradients)

# %% [markdown]
# **Exercise 2: buckets that leave early.** `pack_grad_buckets` makes the buckets in backward's order, the
# last layer first. `bucket.flat_grads` is one tensor of zeros, `bucket.grad_views[p]` p's place in it, shaped
# like p, and `bucket.params_awaiting_grad` the set of its parameters. Autograd calls `arrive(p)` when
# `p.grad` is complete for one micro-batch. Add it to its place and set `p.grad = None`. In the *last*
# micro-batch, p is no longer waited for; when nobody is, send the bucket: `async_op=True` gives an
# `AsyncCollective`, whose `.wait()` comes after backward.

# %% nbgrader={"grade_id": "overlapped", "solution": true}
# %%exercise L03
from nanoinfra.parallel.data_parallel import pack_grad_buckets
from nanoinfra.train.loss import count_valid_tokens


def overlapped_gradients(model, batches, axis, bucket_bytes):
    """As `summed_gradients`; each bucket leaves when its last gradient arrives in the last backward."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buckets = pack_grad_buckets(list(params.items())[::-1], bucket_bytes, None)
    home = {p: bucket for bucket in buckets for p in bucket.grad_views}
    [count] = count_valid_tokens(batches, axis)                           # as in exercise 1
    last = False

    def arrive(p):
        bucket = home[p]
        ### BEGIN SOLUTION
        bucket.grad_views[p].add_(p.grad)
        p.grad = None
        if last:
            bucket.params_awaiting_grad.discard(p)
            if not bucket.params_awaiting_grad:
                bucket.async_all_reduce = all_reduce(bucket.flat_grads, axis, async_op=True)
        ### END SOLUTION

    hooks = [p.register_post_accumulate_grad_hook(arrive) for p in home]
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        (nats(model, batch) / count).backward()
    for hook in hooks:
        hook.remove()
    ### BEGIN SOLUTION
    for bucket in buckets:
        bucket.async_all_reduce.wait()
    ### END SOLUTION
    return {name: home[p].grad_views[p] for name, p in params.items()}


# %%
check.overlapped_gradients(overlapped_gradients)

# %% [markdown]
# ## 4. Read the real one
# All three ways in one class. What does it do that yours leaves out? Think of a parameter that one rank does
# not use in this step; of buckets that fill in another order elsewhere; of weights that differ at the start.

# %%
print(inspect.getsource(DataParallel))

# %% [markdown]
# ## 5. Measure, compare, explain
# Calls and bytes come from the ledger: *counted*. Waits are *timed*: how long the caller stood still.

# %%
def bucketed_gradients(model, batches, axis, bucket_bytes):
    shared = DataParallel(model, axis, "buckets", bucket_bytes)
    axis.comm_log.take_records()                                             # the broadcast of the weights
    [count], [batch] = count_valid_tokens(batches, axis), batches         # one micro-batch here
    shared.prepare_for_backward(is_last=True)
    (nats(model, batch) / count).backward()
    return shared.finish_grad_sync()


ways = {"each": (summed_gradients,), "buckets": (bucketed_gradients, S), "overlap": (overlapped_gradients, S)}
results = {way: world.run(trial, f, N, *args) for way, (f, *args) in ways.items()}
for way in ("each", "buckets"):
    measure(f"L03.calls_{way}", counted, len(results[way][0][0]["rows"]), "calls")
twice = world.run(trial, overlapped_gradients, N, S, micro_batches=2)
measure("L03.bytes", counted, sum(row.payload_bytes for row in twice[0][0]["rows"]), "B")
for way in ways:
    measure(f"L03.wait_{way}", least, results[way], "wait")
compare_predictions(list(check.PREDICTIONS))

# %% [markdown]
# Rank 0 in each of the three ways, its all-reduces from its ledger, under the backward of the layers.

# %%
def three_ways(trials):
    picture, axes = draw.new_figure(9, 3.6, "backward (grey); all-reduces, hidden (pale) or exposed (orange)")
    bar = {"height": 0.34, "edgecolor": "white"}
    for y, one in enumerate(trials):
        start = one["naps"][0][0]
        for begin, end in one["naps"]:
            axes.barh(y - 0.2, end - begin, left=begin - start, color=draw.GREY, **bar)
        for row in one["rows"]:
            axes.barh(y + 0.2, row.end_time - row.start_time, left=row.start_time - start, color="#f7e3bd",
                      **bar)
            axes.barh(y + 0.2, -row.wait_seconds, left=row.end_time - start, color=draw.ORANGE, zorder=3,
                      **bar)
        axes.text(row.end_time - start, y + 0.2, f"  waits {one['wait'] * 1e3:.0f} ms", va="center",
                  fontsize=10)
    axes.set_yticks(range(len(trials)), ways)
    axes.set(xlim=(0, 1.18 * axes.get_xlim()[1]), ylim=(2.5, -0.5), xlabel="seconds since backward began")
    return picture


three_ways([results[way][0][-1] for way in ways])

# %% [markdown]
# **How large should a bucket be?** The line is the schedule on a clock: one leaves when full, on a free wire.

# %%
def exposed(bucket_bytes):
    params = [(name, p) for name, p in sleepy_model()[0].named_parameters() if p.requires_grad]
    tasks, at = {layer: SimulatedTask("rank", C) for layer in range(1, L + 1)}, 0
    for size in (bucket.flat_grads.nbytes for bucket in pack_grad_buckets(params[::-1], bucket_bytes, None)):
        at += size                                              # gradients of ceil(at / S) layers
        tasks["sum", at] = SimulatedTask("wire", ring_collective_seconds("all_reduce", size, N, ALPHA, BETA),
                                         (ceil(at / S),))
    return max(end for _, end in simulate_tasks(tasks).values()) - L * C


sizes = [S // 12, S // 4, S, 2 * S, L * S][::2 if FAST else 1]
smooth = sorted([*sizes, *(S // 12 * 2 ** (k / 16) for k in range(16 * 6))])
points = [least(world.run(trial, overlapped_gradients, N, size), "wait").value for size in sizes]
lines = {"overlap": (smooth, [exposed(size) for size in smooth])}
picture = draw.plot_curves(lines, {"overlap": (sizes, points)}, "bytes of a bucket", "seconds of waiting",
                           "the exposed wait, by size of the buckets")
draw.label_x_axis_in_bytes(picture, sizes)

# %% [markdown]
# **Explain.** Four sentences. (a) Why is the last bucket never hidden? (b) Which two costs make the curve a
# valley? (c) Make the layers larger, so that t(S) > C. What does overlap wait then? (d) Give the speed-up of
# N ranks with overlap over one rank. Where does it end, as N grows and the sequences of a step do not?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 4}
# <!-- ### BEGIN SOLUTION -->
# (a) It is complete only when backward ends, so no compute is left to hide it. (b) Small buckets pay 2(N−1)α
# each, more than the compute beside them can hide; large ones leave later, and the last one is larger. (c)
# The wire never rests: the first bucket leaves after C, L of them take L·t(S), and L·t(S) − (L−1)·C shows.
# (d) A layer's forward and backward take 1.5·N·C on one rank: 1.5·L·N·C / (1.5·L·C + t(S)). C falls as 1/N,
# and t(S) grows with 2(N−1)α: soon t(S) > C, case (c), and a further rank makes the step slower.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Overlap that is wrong by one slip each. Which are wrong in value, and which only slow?

# %%
mutants = [m for m in collect_lesson_mutants("03") if m.check is check.overlapped_gradients]
for mutant in mutants[::5] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %%
world.close()

# %% [markdown]
# ## 7. What came next
# Horovod (2018) fused small tensors; PyTorch hooked buckets of 25 MB into backward. Every rank still holds
# all weights, gradients and moments: ZeRO (lesson 08) keeps 1/N. Lessons 06 and 07 cut the model itself.
#
# - Li et al., *PyTorch distributed: experiences on accelerating data parallel training*, VLDB 2020.
# - Sergeev and Del Balso, *Horovod: fast and easy distributed deep learning in TensorFlow*, 2018.
