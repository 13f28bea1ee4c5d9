# %% [markdown]
# # Lesson 06. Pipelines: GPipe, 1F1B, interleaved, zero bubble
# **2019** · Huang et al., *GPipe*; Narayanan et al., *PipeDream*. **2021** · Narayanan et al., *Efficient
# large-scale training using Megatron-LM*. **2023** · Qi et al., *Zero bubble pipeline parallelism*.
#
# **Needs** a CPU. **Time** 90 minutes. **Builds on** lesson 03 (micro-batches), 04 (what forward leaves).
#
# After this you can compute how long p ranks that share a model's layers stand idle, what each keeps and what
# it sends, in four schedules, and write two of them and a stage that carries them out.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os

import torch

from lessons.l06_pipeline import checks as check
from lessons.l06_pipeline.figures import gantt_chart, measured_timeline
from lessons.l06_pipeline.measurements import rehearse_schedule, run_pipeline_steps, schedule_of_order
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, measure, median_of_times
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.parallel.pipeline import schedules
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import StepTimeline, simulate_schedule
from nanoinfra.parallel.pipeline.split_backward import SplitBackward
from nanoinfra.parallel.pipeline.stage import PipelineStage

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
P, M, V = 4, 8, 2                            # stages, micro-batches, chunks a stage of the interleaved
EVEN, WIDE = (2, 2, 2), (2, 3, 4)            # slots of a micro-batch: forward, backward to input, to weights
SLOT, REPEATS = (0.01, 1) if FAST else (0.03, 3)                           # s, trials to take the median of
B, T, C, L = 2, 16, 32, 8
CONFIG = ModelConfig(61, C, L, 4, 4, C // 4, 4 * C, T, tied=False, family="gpt2")
world = RankPool(P, timeout=120)

# %% [markdown]
# ## 1. The wall
# GPT-2 xl trains with 25 GB of states, and a GPU has 24. Each rank of lesson 03 would hold all of them. So
# give each of p ranks some of the layers, one after another: it passes on what its last layer makes, and back
# comes the gradient. Stages here only sleep for as long as they would compute, so four of them fit your
# cores, but what they send and wait for is real.

# %%
def on_ranks(lists, times, slot=0.0, repeats=1):
    """(the timeline in slots, counted; one in s for each repeat, timed) of a schedule on real ranks."""
    stages = world.run(rehearse_schedule, lists, times, slot, repeats=repeats)[::P // len(lists)]
    return StepTimeline([trials[-1][1] for trials in stages]), [
        measured_timeline([real for real, _ in trial]) for trial in zip(*stages)]


states, rows = 16 * parameter_count(config_for_size("xl")), []
for p in (1, 2, 4):
    _, [naive] = on_ranks(build_pipeline_schedule("gpipe", p, 1), [P * M // p * t for t in EVEN], SLOT / 4)
    rows.append((str(p), f"{config_for_size('xl').layers // p}", f"{states / p / 1e9:.1f} GB",
                 f"{naive.step_seconds:.2f} s",
                 f"{sum(naive.idle_seconds) / p / naive.step_seconds:.0%}"))
DisplayTable("a batch through p stages", ("ranks", "layers", "states of each", "a step, timed", "idle"), rows)

# %%
gantt_chart({"one batch, four ranks": naive}, "one stage works, three wait", "s")

# %% [markdown]
# The model fits. But four ranks take as long as one would: a stage needs what the stage before it has made,
# so one works at a time. Three GPUs in four are paid for doing nothing.
#
# ## 2. Predict
# **Bubble.** Cut the batch into m micro-batches. A stage takes F slots for the forward of one, B for the
# gradient of its input, W for that of its weights. The last stage gets its first input after (p−1)F. Then it
# always has work, m(F+B+W). Its last gradient still goes up through p−1 stages, B+W each. So a step lasts
# (m+p−1)(F+B+W), and every stage, with m(F+B+W) to do, idles the rest: in *GPipe*, all forwards and then all
# backwards, and in *1F1B*, where stage r goes p−1−r forwards ahead, then takes turns, a forward, a backward.
#
# **Interleaved.** Each stage has v chunks of layers, and a micro-batch passes all stages v times. The ranks
# fill and drain by chunks, which take 1/v of the time.
#
# **Zero bubble** (ZB-H1). The stage before waits for B, not for W. Stage r puts its W off by r micro-batches:
# the last has p−1 of them left to do while its last gradient goes up. What is left of the bubble? (But the
# last stage never waits less than (p−1)F, nor the first, which may hold p micro-batches, less than (p−1)B.)

# %%
layer, message = sum(layer_activation_bytes_by_term(CONFIG, B, T, 4).values()), 4 * B * T * C
print(f"p={P} m={M} v={V}, {L} layers; F, B, W in slots of {SLOT * 1e3:g} ms: EVEN {EVEN}, or WIDE {WIDE}:\n"
      "few tokens in wide layers, whose weights' gradients take longest.\n"
      f"A layer keeps {layer:,} bytes of a micro-batch for backward; a message, B T C float32 numbers, "
      f"has {message:,}")

# %% [markdown]
# Commit eleven numbers. *Idle*: slots of a stage, with EVEN for 1F1B, interleaved and zero bubble, with WIDE
# for zero bubble. *Held*: bytes that the fullest stage keeps at its worst moment, for GPipe and 1F1B; what a
# forward left stays until its backward. *Sent*: bytes of the busiest stage in a step, a message a micro-batch
# for each border that its chunks have, on its way forward or back. *Step*: seconds, with EVEN.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L06.idle_1f1b", <formula>, "slots")    and idle_interleaved, idle_zb, idle_zb_wide
# predict("L06.held_gpipe", <formula>, "B")       and held_1f1b
# predict("L06.sent_1f1b", <formula>, "B")        and sent_interleaved
# predict("L06.step_1f1b", <formula>, "s")        and step_interleaved, step_zb
### BEGIN SOLUTION
def left(forward, to_input, to_weights):
    return (P - 1) * max(forward, to_input, forward + to_input - to_weights)


idle = {"1f1b": (P - 1) * sum(EVEN), "interleaved": (P - 1) * sum(EVEN) / V, "zb": left(*EVEN)}
for how, slots in {**idle, "zb_wide": left(*WIDE)}.items():
    predict(f"L06.idle_{how}", slots, "slots")
predict("L06.held_gpipe", M * L // P * layer, "B")
predict("L06.held_1f1b", P * L // P * layer, "B")
predict("L06.sent_1f1b", 2 * M * message, "B")
predict("L06.sent_interleaved", 2 * V * M * message, "B")
for how, slots in idle.items():
    predict(f"L06.step_{how}", (M * sum(EVEN) + slots) * SLOT, "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# The real schedules, on a clock: a list for each stage says what it does and in which order. Each thing
# begins as soon as the stage is free and what it needs has come. No process runs.

# %%
gantt_chart({"GPipe": simulate_schedule(build_pipeline_schedule("gpipe", P, M), *EVEN),
             "1F1B": simulate_schedule(build_pipeline_schedule("1f1b", P, M), *EVEN)},
            f"{M} micro-batches through {P} stages", "slots")

# %% [markdown]
# **Exercise 1: 1F1B.** `yield` what stage r of p does with micro-batches 0 to m−1: `Forward(k)`,
# `Backward(k)`. With p = 2, m = 3 stage 0 does F0 F1 B0 F2 B1 B2, stage 1 F0 B0 F1 B1 F2 B2. There may be
# fewer micro-batches than stages. Five to seven lines.

# %% nbgrader={"grade_id": "one_f_one_b", "solution": true}
# %%exercise L06
from nanoinfra.parallel.pipeline.schedules import Backward, BackwardInput, BackwardWeight, Forward


def one_f_one_b(p, r, m):
    """What stage r of p does in a step of m micro-batches, in order."""
    ### BEGIN SOLUTION
    ahead = min(m, p - 1 - r)
    for k in range(ahead):
        yield Forward(k)
    for k in range(m):
        if ahead + k < m:
            yield Forward(ahead + k)
        yield Backward(k)
    ### END SOLUTION


# %%
check.one_f_one_b(one_f_one_b)

# %% [markdown]
# Now shrink the bubble. Above, two chunks a stage: boxes half as long, and the later chunk pale. Below,
# backward in two halves. Which stage fills which gap with which W?

# %%
gantt_chart({"interleaved": simulate_schedule(build_pipeline_schedule("interleaved", P, M, V),
                                              *(t / V for t in EVEN)),
             "zero bubble": simulate_schedule(build_pipeline_schedule("zb-h1", P, M), *EVEN)},
            "the same work, and less idle",
            "slots")

# %% [markdown]
# **Exercise 2: zero bubble.** 1F1B with `BackwardInput(k)` where `Backward(k)` was, and after it the
# `BackwardWeight` of r micro-batches ago; those that are left come at the end. Stage 1 of 2 with m = 3 does
# F0 I0 F1 I1 W0 F2 I2 W1 W2. Eight to ten lines.

# %% nbgrader={"grade_id": "zero_bubble", "solution": true}
# %%exercise L06
def zero_bubble(p, r, m):
    """What stage r of p does in a step of m micro-batches, in order."""
    ### BEGIN SOLUTION
    ahead = min(m, p - 1 - r)
    for k in range(ahead):
        yield Forward(k)
    for k in range(m):
        if ahead + k < m:
            yield Forward(ahead + k)
        yield BackwardInput(k)
        if k >= r:
            yield BackwardWeight(k - r)
    for k in range(max(0, m - r), m):
        yield BackwardWeight(k)
    ### END SOLUTION


# %%
check.zero_bubble(zero_bubble)

# %% [markdown]
# **Exercise 3: a stage.** Carry out an `order` of `Forward` and `Backward`; stage r is rank r of `axis`.
# - `stage.first`, `stage.last`: is it at an end of the model? `stage.enter(k)`: what the first begins with.
# - `stage.run(x, k)`: its layers. (B, T, C), the stream; on the last stage (), the loss, divided already.
# - `stage.place(k)`: an empty tensor to receive a stream or its gradient. `recv(place, axis, src)` waits
#   and returns it. It has no history: `.requires_grad_()` makes autograd keep its gradient.
# - `send(x, axis, dst, async_op=True)` gives an `AsyncCollective`. `.wait()` for all at the end: two stages
#   that wait for each other's sends wait for ever. Send `y.detach()`, and back the gradient of x.
#
# `y.backward(grad)` goes on from the gradient that came. Keep x and y until then, no longer. 15 to 20 lines.

# %% nbgrader={"grade_id": "run_stage", "solution": true}
# %%exercise L06
from nanoinfra.distributed.comm import recv, send


def run_stage(order, stage, axis):
    """Afterwards each weight's .grad is the sum over the micro-batches. Nothing is returned."""
    kept, sent = {}, []                                            # k: (x, y) of a forward; sends under way
    ### BEGIN SOLUTION
    for what in order:
        k = what.micro_batch
        if isinstance(what, Forward):
            if stage.first:
                x = stage.enter(k)
            else:
                x = recv(stage.place(k), axis, axis.rank - 1).requires_grad_()
            y = stage.run(x, k)                                    # (B, T, C), or ()
            kept[k] = x, y
            if not stage.last:
                sent.append(send(y.detach(), axis, axis.rank + 1, async_op=True))
        else:
            x, y = kept.pop(k)
            y.backward(None if stage.last else recv(stage.place(k), axis, axis.rank + 1))
            if not stage.first:
                sent.append(send(x.grad, axis, axis.rank - 1, async_op=True))
    for pending in sent:
        pending.wait()
    ### END SOLUTION


# %%
check.run_stage(run_stage)

# %% [markdown]
# ## 4. Read the real one
# In `interleaved_1f1b`, which chunk does the k-th forward go through, and why must p divide m?
# `insert_sends_and_recvs` has each receive posted two computations early: what does that spare who needs it?
# Why do messages to earlier stages take a group of their own (`_axis_for`)? `SplitBackward` walks autograd's
# graph: what is a *joint*?

# %%
for it in (schedules.interleaved_1f1b, schedules.insert_sends_and_recvs, PipelineStage.forward,
           PipelineStage._output_grad, PipelineStage._axis_for, SplitBackward):
    print(inspect.getsource(it))

# %% [markdown]
# ## 5. Measure, compare, explain
# Your two schedules and the real interleaved one, on ranks that sleep. Each message says in which slot it
# left: so idle slots are *counted*, by what was really sent, and seconds are *timed*. Then your schedules
# drive the trainer's own stages with a real decoder; what layers keep and what stages send is *counted*.

# %%
yours = {"1f1b": schedule_of_order(one_f_one_b, P, M), "zb-h1": schedule_of_order(zero_bubble, P, M)}
ways = {"1f1b": (yours["1f1b"], EVEN), "interleaved": (build_pipeline_schedule("interleaved", P, M, V), EVEN),
        "zb": (yours["zb-h1"], EVEN), "zb_wide": (yours["zb-h1"], WIDE)}
runs = {how: on_ranks(*way, SLOT * (way[1] == EVEN), REPEATS) for how, way in ways.items()}
batches = [tuple(torch.randint(CONFIG.vocab, (2, B, T))) for _ in range(M)]
trained = {kind: world.run(run_pipeline_steps, CONFIG, kind, P, V if kind == "interleaved" else 1, batches,
                           "float32", lists=yours.get(kind)) for kind in schedules.SCHEDULES}
kept = {kind: [run["kept"] for run in each] for kind, each in trained.items()}
sent = {kind: [sum(row.payload_bytes for row in run["rows"] if row.op == "send") for run in each]
        for kind, each in trained.items()}
for how, (slots, trials) in runs.items():
    measure(f"L06.idle_{how}", counted, max(slots.idle_seconds), "slots")
    if ways[how][1] == EVEN:
        measure(f"L06.step_{how}", median_of_times, [trial.step_seconds for trial in trials])
for kind in ("gpipe", "1f1b"):
    measure(f"L06.held_{kind}", counted, max(kept[kind]), "B")
for kind in ("1f1b", "interleaved"):
    measure(f"L06.sent_{kind}", counted, max(sent[kind]), "B")
compare_predictions(list(check.PREDICTIONS))

# %%
seconds = [t * SLOT for t in EVEN]
gantt_chart({"1F1B by the clock": simulate_schedule(yours["1f1b"], *seconds),
             "your 1F1B on four ranks": runs["1f1b"][1][-1],
             "zero bubble by the clock": simulate_schedule(yours["zb-h1"], *seconds),
             "your zero bubble on four ranks": runs["zb"][1][-1]}, "a schedule, and what became of it", "s")

# %%
losses = {kind: sum(run["loss"] for run in each) for kind, each in trained.items()}
DisplayTable("the trainer's own stage (counted)", ("schedule", "layers of a micro-batch kept by each stage",
                                                   "bytes sent by each stage", "loss"),
             [(kind, ", ".join(f"{b / layer:g}" for b in kept[kind]), ", ".join(f"{b:,}" for b in sent[kind]),
               f"{losses[kind]:.6f}") for kind in trained])

# %% [markdown]
# **More micro-batches.** The same bubble, a longer step. Lines are formulas, dots were counted on ranks.

# %%
KINDS = {"GPipe, 1F1B": ("1f1b", 1), "interleaved": ("interleaved", V), "zero bubble": ("zb-h1", 1)}
MICROS, MORE = (4, 8) if FAST else (4, 8, 16, 32), (4, 8, 16, 32, 64)


def share(idle, m):
    return idle / (idle + m * sum(EVEN))


lines = {name: (MORE, [share(formulas.pipeline_idle_seconds(kind, P, m, *EVEN, v), m) for m in MORE])
         for name, (kind, v) in KINDS.items()}
dots = {name: (MICROS, [share(max(on_ranks(build_pipeline_schedule(kind, P, m, v), EVEN)[0].idle_seconds), m)
                        for m in MICROS])
        for name, (kind, v) in KINDS.items()}
draw.plot_curves(lines, dots, "micro-batches in a step", "idle, of a step", f"the bubble of {P} stages")

# %% [markdown]
# **Explain.** Five sentences. (a) GPipe and 1F1B idle alike: what does 1F1B save, and how does that make the
# bubble smaller after all? (b) Interleaving halves the bubble: what does it pay, in bytes and in layers kept?
# (c) With WIDE the paper's (p−1)(F+B−W) is 3 slots: who waits for the other 6, and for what? (d) Zero bubble
# keeps p micro-batches on *every* stage: which stages pay for that, and what would stage 0 do with 2p−1? (e)
# At a step's end all wait until the last gradient is there. PipeDream did not wait: what is wrong then?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) It keeps p − r micro-batches instead of m; in that memory m can grow, and (p−1)/(m+p−1) falls. (b) v
# times the bytes on the busiest stage, and stage 0 keeps 2(p−1) + (v−1)p + 1 chunks, 11 layers and not 8.
# (c) The first stage, for the first gradient: it comes (p−1)B after its p forwards, and before it there are
# no weights to do. (d) The later ones, which kept p − r; stage 0 could run forwards while it waits (ZB-H2).
# (e) A micro-batch's backward meets other weights than its forward did, unless each keeps a copy of those it
# began with.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# One slip each (a few of them where LESSON_FAST is set). Which of them would a loss curve show?

# %%
mutants = collect_lesson_mutants("06")
for mutant in mutants[1:30:14] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.check.name}: {mutant.name}\n    rejected by: {failure.criterion.name}")
    print(f"    {failure.text.splitlines()[0]}")
world.close()

# %% [markdown]
# ## 7. What came next
# Pipelines became the axis between nodes: a border costs a micro-batch 2 B·T·C numbers, there and back, where
# *every layer* cut over t ranks (lesson 07) costs 8(t−1)/t of B·T·C; lesson 10 has both. ZB-V folds the
# model, its last layers on the first stage, and all but closes the bubble; DualPipe feeds it from both ends.
#
# - Qi et al., *Pipeline parallelism with controllable memory*, 2024 (folded schedules, memory as a dial).
# - DeepSeek-AI, *DeepSeek-V3 technical report*, 2024 (DualPipe).
