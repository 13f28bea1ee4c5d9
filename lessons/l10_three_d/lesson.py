# %% [markdown]
# # Lesson 10. Three dimensions at once
# **2021** · Narayanan et al., *Efficient large-scale language model training on GPU clusters using
# Megatron-LM* · **2022** · BigScience, *BLOOM: a 176B-parameter open-access multilingual language model*.
#
# **Needs** a CPU. **Time** 90 minutes. **Builds on** lesson 03, 06 (pipelines), 07; 08 helps.
#
# After this you can compute what each rank of a mesh sends on each of its axes, say which gradient is summed
# over which of them, and lay the axes on machines.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os

from lessons.l10_three_d import checks as check
from lessons.l10_three_d import figures
from lessons.l10_three_d.cluster_tables import GPT3_COLUMNS, bloom_trials_table, gpt3_on_mesh
from nanoinfra.config import ModelConfig
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.pipeline import split_layers_into_chunks
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.instruments.gradient_parity import (
    float64_train_flags,
    largest_gradient_error,
    run_gradient_step,
)
from nanoinfra.lab.measure import counted, measure, median_of_times
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import format_quantity, last_prediction, predict
from nanoinfra.parallel import parallelize
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import simulate_schedule

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
AXES = {"pp": 2, "dp": 2, "tp": 2}
p, d, t = AXES.values()
B, T, G = 2, 16, 16                          # sequences of a micro-batch, their tokens, sequences of a step
CONFIG = ModelConfig(vocab=254, width=48, layers=4, heads=4, kv_heads=4, head_dim=12, hidden=130, context=T)
C, V, l, m = CONFIG.width, CONFIG.vocab, CONFIG.layers // p, G // (d * B)
SECONDS, REPEATS = (0.005, 1) if FAST else (0.12, 3)             # a layer forward, for a micro-batch
INSIDE, BETWEEN = ((1e-4, 4e7), (1e-3, 4e6)) if FAST else ((1e-4, 4e6), (1e-3, 2e5))      # s, bytes/s
world = RankPool(p * d * t, timeout=120)

# %% [markdown]
# ## 1. The wall
# There are three ways to use many GPUs. Take GPT-3, and one way alone. An A100 has 80 GB and computes at half
# of its peak; it sends 300 GB/s to the seven others of its node, and 25 GB/s to other nodes. A step has 1536
# sequences, a micro-batch one. ZeRO cuts over dp: the optimizer, and in the last row everything. Activations
# are left out, and nothing is hidden behind compute.

# %%
DisplayTable("GPT-3, one axis alone (modelled)", GPT3_COLUMNS, [
    gpt3_on_mesh(tp=8, inside="tp"), gpt3_on_mesh(tp=96), gpt3_on_mesh(tp=128), gpt3_on_mesh(pp=96),
    gpt3_on_mesh(pp=128), gpt3_on_mesh(dp=1024), gpt3_on_mesh(dp=1024, zero=3)])

# %% [markdown]
# tp ends at 96 heads, and has a fast wire as far as the node's eighth GPU. pp ends at 96 layers. dp ends at
# 1536 sequences, and at memory long before; ZeRO-3 has room, and waits. Whoever has 1024 GPUs must cut in
# more than one way at a time.
#
# ## 2. Predict
# A rank stands at three places at once: its stage has l = L/p layers, of each of them it has one of t parts,
# and one of d shares of the sequences, m = G/(dB) micro-batches. Each axis sees what the others leave.
# - **tp.** BTC numbers go through 4 all-reduces a layer and micro-batch, of *l* layers. The first stage has
#   one more for the embedding; the last one has one for the head, and three of BT numbers for the loss.
# - **pp.** BTC numbers go on to the next stage for each micro-batch, or come back; t ranks send the same.
# - **dp.** Once a step, whatever m, all gradients of the rank: of matrices one of t parts, of norms all.
# - **tied.** The first stage's embedding and the last one's head are one weight: a sum over these two *ends*.
#
# A payload is what an all-reduce sums or a message carries. All is float64, 8 bytes, so that errors show.

# %%
print(f"{p=} {d=} {t=}, {l=} layers a stage, {m=} micro-batches of {B=} x {T=}, {C=} {V=}, "
      f"{parameter_count(CONFIG):,} parameters")
matrices = (parameter_count(CONFIG) - V * C - C) // CONFIG.layers - 2 * C
print(f"a layer: {matrices:,} numbers in matrices, two norms of {C}; one norm more before the head. It takes "
      f"{SECONDS * 1e3:g} ms forward, twice that back")
for where, (alpha, beta) in {"inside": INSIDE, "between": BETWEEN}.items():
    print(f"the wire {where} nodes: alpha {alpha * 1e3:g} ms, beta {beta / 1e6:g} MB/s")

# %% [markdown]
# Commit ten numbers. *Payload* of a rank of the first stage, and of the last: on tp, on pp (the same for
# both), on dp, for the tied weight; and of all eight ranks on all axes. *Seconds* of a step whose slow wire,
# the one between nodes, lies under pp, under dp, under tp, while the other two have the fast one. Lesson 06's
# clock replays 1F1B: `simulate_schedule(build_pipeline_schedule("1f1b", p, m), forward, backward, 0,
# message).step_seconds`, with lists of
# each stage's seconds for a micro-batch, its all-reduces included. Then comes dp's sum, in one bucket; then
# the tied weight's, on pp's wire. (`ring_collective_seconds(op, bytes, ranks, alpha, beta)`; a message is a
# "send".)

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L10.tp_first", <formula>, "B")    and tp_last, pp, dp_first, dp_last, tied, all
# predict("L10.step_pp", <formula>, "s")     and step_dp, step_tp
### BEGIN SOLUTION
S, loss = 8 * B * T * C, 3 * 8 * B * T
bytes_ = {"tp_first": m * (4 * l + 1) * S, "tp_last": m * ((4 * l + 1) * S + loss), "pp": m * S,
          "dp_first": 8 * (V * C // t + l * (matrices // t + 2 * C)), "tied": 8 * V * C // t}
bytes_["dp_last"] = bytes_["dp_first"] + 8 * C
bytes_["all"] = d * t * (sum(bytes_.values()) + bytes_["pp"] + bytes_["tied"])
for what, number in bytes_.items():
    predict(f"L10.{what}", number, "B")
for slow in AXES:
    wire = {axis: BETWEEN if axis == slow else INSIDE for axis in AXES}
    one, small = (ring_collective_seconds("all_reduce", size, t, *wire["tp"]) for size in (S, loss / 3))
    forward, backward = l * (SECONDS + 2 * one), l * (2 * SECONDS + 2 * one)
    send = ring_collective_seconds("send", S, 2, *wire["pp"])
    pipe = simulate_schedule(build_pipeline_schedule("1f1b", p, m), [forward + one, forward + 3 * small],
                             [backward, backward + one], 0, send).step_seconds
    sums = (ring_collective_seconds("all_reduce", bytes_["dp_first"], d, *wire["dp"]),
            ring_collective_seconds("all_reduce", bytes_["tied"], 2, *wire["pp"]))
    predict(f"L10.step_{slow}", pipe + sum(sums), "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# Eight ranks as the real mesh has them; a node has four.

# %%
def place():
    mesh = Mesh(**AXES)
    return {axis: getattr(mesh, axis).rank for axis in AXES}


at = world.run(place)
stages = " and ".join(", ".join(map(str, range(*ends))) for ends in split_layers_into_chunks(CONFIG, p, T))
legend = f"pp: layers {stages}\ndp: sequences 0, 2, ... and 1, 3, ...\ntp: heads 0, 1 and 2, 3"
figures.mesh_cubes({legend: (lambda rank: at[rank], 4, {})}, AXES, "who stands where")

# %% [markdown]
# **Exercise 1: who am I, and who stands with me?** `sizes` is {"pp": 2, "dp": 3, "tp": 4}, say, and the last
# axis counts fastest: of these 24, rank 13 is {"pp": 1, "dp": 0, "tp": 1}, and its neighbours on dp are 13,
# 17, 21. Write it for any axes in any order. Two to five lines each.

# %% nbgrader={"grade_id": "places", "solution": true}
# %%exercise L10
from math import prod


def coordinates(rank, sizes):
    """{axis: place on it} of `rank`; `sizes` {axis: ranks on it}, the last axis the fastest."""
    ### BEGIN SOLUTION
    places = {}
    for axis, n in reversed(sizes.items()):
        rank, places[axis] = divmod(rank, n)
    return places
    ### END SOLUTION


def neighbours(rank, axis, sizes):
    """The ranks that differ from `rank` on `axis` alone, in its order; `rank` is one of them."""
    ### BEGIN SOLUTION
    at = coordinates(rank, sizes)
    ranks = range(prod(sizes.values()))
    return [other for other in ranks if coordinates(other, sizes) | {axis: at[axis]} == at]
    ### END SOLUTION


# %%
check.coordinates(coordinates).show()
check.neighbours(neighbours)

# %% [markdown]
# **Exercise 2: one gradient.** Each rank has gradients of its own parts, a dict for each micro-batch, of a
# loss that is divided by the step's tokens already. What belongs together is summed, once a step:
# - over `mesh.dp`, always: others have seen other sequences;
# - over `mesh.tp`, of parameters named "...norm...": under sequence parallelism (lesson 07) each tensor rank
#   has sent its own tokens through them. Matrices are cut, and sums of cut ones make no sense;
# - over `ends`, of "embed.weight": the two stages that have it. Elsewhere `ends` is None, and no such name.
#
# Then the norm of the *whole* gradient, as a float: all ranks clip by it, and what two ranks hold alike must
# count once. Which ranks hold something alike, on which axis? Send a number or two. `all_reduce(x, axis)`
# overwrites x and returns it. Ten to fifteen lines.

# %% nbgrader={"grade_id": "gradients", "solution": true}
# %%exercise L10
from nanoinfra.distributed.comm import all_reduce


def sum_gradients(micro, mesh, ends):
    """{name: this rank's part of the step's gradient} from `micro`, {name: gradient} of each micro-batch."""
    ### BEGIN SOLUTION
    grads = {}
    for name in micro[0]:
        grads[name] = all_reduce(sum(each[name] for each in micro), mesh.dp)
        if "norm" in name:
            all_reduce(grads[name], mesh.tp)
        if name == "embed.weight" and ends:
            all_reduce(grads[name], ends)
    return grads
    ### END SOLUTION


def grad_norm(grads, mesh, ends):
    """The 2-norm of the model's gradient, the same on all ranks; `grads` are what `sum_gradients` returns."""
    ### BEGIN SOLUTION
    def mine(name):
        return ends.rank == 0 if name == "embed.weight" else mesh.tp.rank == 0 or "norm" not in name
    square = sum(grad.square().sum() for name, grad in grads.items() if mine(name))
    return all_reduce(all_reduce(square, mesh.tp), mesh.pp).sqrt().item()
    ### END SOLUTION


# %%
check.sum_gradients(sum_gradients).show()
check.grad_norm(grad_norm)

# %% [markdown]
# ## 4. Read the real one
# No technique here knows of another: `parallelize` applies one after the other, to a model that knows of
# none. Why is the pipeline first, and data parallelism last? Find your three sums, and who counts for the
# norm. And under ZeRO (lesson 08), which axis does a norm add up over besides, and why?

# %%
chunk, model = parallelize.ParallelChunk, parallelize.ParallelModel
for it in (model.__init__, chunk.__init__, chunk.finish_grad_sync, model.finish_grad_sync,
           model.grad_norm_axes, model.counted_in_norm):
    print(inspect.getsource(it))

# %% [markdown]
# ## 5. Measure, compare, explain
# One step on five meshes of eight ranks, against one rank: the largest error of any gradient, ‖got − want‖ /
# ‖want‖, and of the norm, the trainer's and yours.

# %%
with RankPool(1) as one:
    alone = one.run(run_gradient_step, CONFIG, float64_train_flags(dict.fromkeys(AXES, 1), B, G), T)[0]
want = {name: grad for name, (_, grad) in alone["grads"].items()}
lines, counts = [], {}
for sizes in ((2, 2, 2), (1, 8, 1), (1, 4, 2), (2, 1, 4), (4, 2, 1)):
    mesh, flags = " x ".join(map(str, sizes)), float64_train_flags(dict(zip(AXES, sizes)), B, G)
    runs = world.run(run_gradient_step, CONFIG, flags, T, norm_function=grad_norm)
    counts[mesh] = [figures.payload_bytes_by_axis(run["rows"]) for run in runs]
    loss = sum(run["loss"] for run in runs) / flags.axes.tp                  # of each data rank its share
    off = [largest_gradient_error([run["grads"] for run in runs], want),
           *(max(abs(run[whose] / alone["norm"] - 1) for run in runs) for whose in ("norm", "own"))]
    lines.append((mesh, f"{loss:.12f}", *(f"{x:.0e}" for x in off), "pass" if max(off) < 1e-10 else "miss"))
DisplayTable(f"against one rank: loss {alone['loss']:.12f}, norm {alone['norm']:.9f}",
             ("pp x dp x tp", "loss", "gradients", "norm", "your norm", ""), lines)

# %% [markdown]
# *Counted*: what the ledgers of 2 x 2 x 2 say. *Timed*: its steps, with layers that sleep for as long as an
# accelerator would compute, and an emulated wire. A step takes as long as its slowest rank.

# %%
cube = counts["2 x 2 x 2"]
for key, rank, axis in (("tp_first", 0, "tp"), ("tp_last", -1, "tp"), ("pp", 0, "pp"), ("dp_first", 0, "dp"),
                        ("dp_last", -1, "dp"), ("tied", 0, "tied")):
    measure(f"L10.{key}", counted, cube[rank][axis], "B")
measure("L10.all", counted, sum(sum(each.values()) for each in cube), "B")
steps = {}
for slow in ("none", *AXES):
    wire = {axis: BETWEEN if axis == slow else INSIDE for axis in AXES}
    trials = world.run(figures.time_emulated_steps, CONFIG, float64_train_flags(AXES, B, G), T, wire, SECONDS,
                       REPEATS)
    steps[slow] = median_of_times([max(each) for each in zip(*trials)])
for slow in AXES:
    measure(f"L10.step_{slow}", lambda slow=slow: steps[slow])
compare_predictions(list(check.PREDICTIONS))

# %% [markdown]
# The same step on all five meshes: what eight ranks send together. Which axis costs what, if bytes were all?

# %%
figures.stacked_axis_bars({mesh: {axis: sum(each[axis] for each in ranks) / 1e6 for axis in ranks[0]}
                           for mesh, ranks in counts.items()},
                          {"2 x 2 x 2": last_prediction("L10.all")[0] / 1e6},
                          "bytes of a step by axis, all ranks; pp x dp x tp", "MB", "MB, counted")

# %% [markdown]
# Four ranks make a node. The slowest axis of your `coordinates` is the one that leaves it.

# %%
def laid(*order):
    """The label of a panel, and what is drawn there: axes counted in this order, the last the fastest."""
    leaves = sum(each[order[0]] + each["tied"] * (order[0] == "pp") for each in cube)
    return (f"{', '.join(order)}: {format_quantity(leaves / 1e3, 'kB')} leave nodes",
            (lambda rank: coordinates(rank, {axis: AXES[axis] for axis in order}), 4, cube[0]))


figures.mesh_cubes(dict([laid("pp", "dp", "tp"), laid("dp", "pp", "tp"), laid("tp", "dp", "pp")]), AXES,
                   "which axis leaves the node? (a line is as wide as its bytes)")

# %%
fast, names = steps["none"].value, {axis: f"{axis} between nodes" for axis in AXES}
added = {axis: max(0.0, steps[axis].value - fast) for axis in AXES}
figures.stacked_axis_bars({names[axis]: {"all inside a node": fast, axis: added[axis]} for axis in AXES},
                          {names[axis]: last_prediction(f"L10.step_{axis}")[0] for axis in AXES},
                          "a step of 2 x 2 x 2, and what the slow wire adds", "s",
                          "s, timed on an emulated wire")

# %% [markdown]
# GPT-3 on 1024 GPUs again, now in three dimensions. And what BLOOM's makers timed before they chose: meshes
# of 384 A100s, eight to a node, for 181 billion parameters and some 2048 sequences a step.

# %%
DisplayTable("GPT-3, 1024 GPUs (modelled)", GPT3_COLUMNS, [
    gpt3_on_mesh(8, 16, 8, "tp"), gpt3_on_mesh(8, 16, 8, "pp"), gpt3_on_mesh(2, 64, 8, "tp"),
    gpt3_on_mesh(32, 32, 1)])

# %%
bloom_trials_table()

# %% [markdown]
# **Explain.** Five sentences. (a) tp sends the most, dp comes next, pp the least: which one would you lay
# between nodes, and what else than bytes speaks against many stages? (b) Here 4 x 2 x 1 sends the least of
# all: why is it not the answer for GPT-3? (c) t neighbours send the same stream to the next stage: how could
# a node send it once? (d) BLOOM took a pipeline that idles 8 %, not the one that idles 2 %: what is wrong
# with that? (e) A rank forgets the sum over `ends`: who notices, and when?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) pp, then dp; but p stages idle (p-1)/(m+p-1) of a step, and m falls as d grows. (b) Bytes are not time:
# tp's stay inside a node, and without tp 1024 GPUs are 32 stages for 48 micro-batches, which idle 39 %. (c)
# Each sends 1/t, and the next node gathers it inside (Megatron's scatter/gather; under sequence parallelism
# it is cut already). (d) 36 layers a stage fill the memory with micro-batches of two, of which tp 8 makes
# thin matrices, and three times the gradients go between nodes. (e) The first loss is right; the norm is not,
# and from the first update on the two copies drift apart. A checkpoint keeps one of them.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# One slip each. Which would a loss curve show? Which do only bytes show?

# %%
mutants = collect_lesson_mutants("10")
for mutant in mutants[4::16] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.check.name}: {mutant.name}\n    rejected by: {failure.criterion.name}")
    print(f"    {failure.text.splitlines()[0]}")
world.close()

# %% [markdown]
# ## 7. What came next
# Three became four and five: long sequences are cut along T (lesson 13), experts over ranks (lesson 14).
# Llama 3 orders its axes tp, cp, pp, dp, from the wire that must be fastest outwards. OPT had two of them,
# ZeRO-3 and tp. Alpa and others search for the mesh instead of choosing it (lesson 20).
#
# - Narayanan et al., 2021 (above): section 3, which mesh for which model, and why.
# - Le Scao et al., *BLOOM*, 2022, section 3.4; the trials: bigscience-workshop/bigscience on GitHub.
