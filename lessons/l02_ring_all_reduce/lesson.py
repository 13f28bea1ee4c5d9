# %% [markdown]
# # Lesson 02. Ring all-reduce from send and receive
# **2009** · Patarasuk and Yuan, *Bandwidth optimal all-reduce algorithms for clusters of workstations*. It
# came to deep learning in 2017, with Gibiansky's post at Baidu and with Horovod.
#
# **Needs** a CPU. **Time** 60 minutes. **Builds on** lesson 01: a gradient has as many bytes as the
# weights.
#
# **Help** is welcome: from people, and from an AI that tutors and does not solve (`lessons/AI_POLICY.md`).
#
# After this you can compute how many bytes each rank sends to sum a tensor over N ranks, how long that
# takes, and when another algorithm is faster. Every later lesson uses these two numbers.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os
import time

import torch

from lessons.l02_ring_all_reduce import checks as check
from lessons.l02_ring_all_reduce.figures import comm_timeline, ring_diagram
from nanoinfra.distributed import comm, ring_collectives
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas.collectives import ring_collective_seconds, tree_all_reduce_seconds
from nanoinfra.lab import draw
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, measure, median_of_times
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
N = 4 if FAST else 8                         # ranks
S = 2**20 if FAST else 2**22                 # bytes of the tensor that is summed
ALPHA, BETA = 4e-3, 20e6                     # the wire: 4 ms a message, 20 MB/s
REPEATS = 3
world = RankPool(N, emulated_links={"dp": (ALPHA, BETA)}, timeout=120)

# %% [markdown]
# `world` is N processes on this machine. Between them lies an *emulated wire*: a rank sends one message
# after the other, each takes α + bytes / β seconds, and receiving costs nothing. The wire is slow on
# purpose, so that your laptop's own speed hides behind it. A real link between servers has an α of about
# 5 µs and a β of 50 GB/s. The formulas are the same.
#
# ## 1. The wall
# Each rank holds a gradient of S bytes, and each needs the sum. The plain way: all send to rank 0, rank 0
# adds, rank 0 sends the sum to all. What you need to read it:
#
# - An `axis` is a group of ranks: `axis.rank` is my place, `axis.size` how many we are. A `Mesh` of
#   `dp=n, pp=N // n` arranges the N ranks in groups; its `.dp` is the group of n that holds this rank.
# - `comm.send(x, axis, dst)` and `comm.recv(buffer, axis, src)` move one tensor; `recv` fills and returns
#   `buffer`.
# - The *ledger* notes each call and its bytes (`row.payload_bytes`). `send` and `recv` have a row each; an
#   `ring_shift` (section 3) does both and has one row, with the bytes sent.
# - `world.run(f, ...)` runs f in every rank and returns the list of results.

# %%
def naive_all_reduce(x, axis):
    if axis.rank:
        comm.send(x, axis, dst=0)
        return comm.recv(x, axis, src=0)
    for source in range(1, axis.size):
        x += comm.recv(torch.empty_like(x), axis, source)
    for to in range(1, axis.size):
        comm.send(x, axis, to)
    return x


def trial(all_reduce, n, size):
    """Runs inside each rank: seconds of each repeat, and the ledger of the last one."""
    mesh = Mesh(dp=n, pp=N // n)             # N / n groups of n ranks, side by side
    x, seconds = torch.zeros(size // 4), []
    for _ in range(REPEATS):
        comm.barrier(mesh.dp)                # all start together
        mesh.comm_log.take_records()
        begin = time.monotonic()
        all_reduce(x, mesh.dp)
        seconds.append(time.monotonic() - begin)
    return seconds, mesh.comm_log.take_records()


def slowest(results):
    """A collective is done when its last rank is: the median over repeats of the slowest rank's time."""
    return median_of_times([max(times) for times in zip(*(seconds for seconds, _ in results))])


# %%
walls = []
for n in (n for n in (2, 4, 8) if n <= N):
    results = world.run(trial, naive_all_reduce, n, S // 4)
    # send and recv have a row each, so this sum is what a rank sent plus what it received
    through = [f"{sum(row.payload_bytes for row in ledger):,}" for _, ledger in results]
    walls.append((str(n), through[0], through[1], f"{slowest(results).value * 1e3:.0f} ms"))
DisplayTable(f"the plain way, on a tensor of S/4 = {S // 4:,} bytes",
             ("ranks", "bytes through rank 0", "bytes through rank 1", "time"), walls)

# %% [markdown]
# Rank 0 handles 2(N−1) copies of the tensor, every other rank 2. Receiving is free and the N−1 senders
# work at once, but rank 0 then sends N−1 copies one by one: N(α + bytes/β) in all. So the time grows with
# N, and while rank 0 works, all the other links are idle. With a thousand ranks this is hopeless. A
# *tree* (ranks pair up, then pairs of pairs) needs log₂N rounds, but each round still moves whole
# tensors, and half of the ranks have nothing to do after the first.

# %% [markdown]
# ## 2. Predict
# **Let every link work all the time.** Put the ranks on a ring: each gives to its right neighbour and takes
# from its left. Cut the tensor into N chunks of S/N bytes.
#
# 1. *Reduce-scatter*. Chunk c starts at rank c+1 and travels the ring. Every rank that it meets adds its
#    own part. After N−1 hops it has met everyone and rests at rank c, complete.
# 2. *All-gather*. Each finished chunk goes round once more, N−1 hops, and everyone keeps a copy.
#
# All N chunks travel at the same time. How many steps is that for both phases? How many bytes does a rank
# send in each, and how long does one step take?
#
# Commit two numbers for N ranks and S bytes: the bytes that *one rank sends*, and the *seconds* of the
# whole. Write them as formulas in `N`, `S`, `ALPHA`, `BETA`. A prediction counts for being made; you may
# be wrong. You may also change your mind: the table will say that it shows your second one.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L02.bytes", <formula>, "B")
# predict("L02.seconds", <formula>, "s")
### BEGIN SOLUTION
predict("L02.bytes", 2 * (N - 1) / N * S, "B")
predict("L02.seconds", 2 * (N - 1) * (ALPHA + S / N / BETA), "s")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# You get one primitive: `ring_shift(x, axis)` from `distributed/comm.py` gives `x` to the right neighbour and
# returns what the left neighbour gave, a tensor of the same shape. All ranks call it together.
# `axis.rank` is your place, `axis.size` is N.
#
# The first step, done for you on 4 ranks. Row c of `x` is chunk c; every entry is 1, so that a number says
# how many ranks are summed in it.

# %%
def first_step():
    axis = Mesh(dp=4, pp=N // 4).dp
    x = torch.ones(4, 1)                                           # (N, numel/N)
    sent = (axis.rank - 1) % 4                                     # chunk c starts at rank c + 1
    came = comm.ring_shift(x[sent], axis)                            # the left neighbour's: chunk sent - 1
    x[sent - 1] += came
    return x.flatten().tolist()


summed = [[int(value) for value in row] for row in world.run(first_step)[:4]]
ring_diagram(summed, sent=[(rank - 2) % 4 for rank in range(4)], title="after step 1 of 3, about to send "
             "again")

# %% [markdown]
# **Exercise 1: reduce-scatter.** Send `partial`, take the left neighbour's, add your own row of that chunk,
# and so on. Which chunk comes in at step 1? At step 2? Look at rank 0 in the picture: it sent chunk 3, and
# holds 2 ranks' worth of chunk 2. Return the complete row: on rank r that is row r. Four to six lines.
#
# The line `%%exercise L02` writes the cell to `work/L02.py`. Rank processes, the checks and `make grade`
# run that file, and it knows nothing of this notebook: whatever the cell uses, even `torch`, it imports
# itself.

# %% nbgrader={"grade_id": "reduce_scatter", "solution": true}
# %%exercise L02
from nanoinfra.distributed.comm import ring_shift


def ring_reduce_scatter(x, axis):
    """Sum `x` (N, numel/N) over the ranks. Returns row `axis.rank` of the sum: (numel/N,)."""
    n, rank = axis.size, axis.rank
    partial = x[rank - 1]                                          # (numel/N,) the chunk that starts here
    ### BEGIN SOLUTION
    for step in range(1, n):
        came = ring_shift(partial, axis)                             # chunk rank - 1 - step
        partial = came + x[(rank - 1 - step) % n]
    ### END SOLUTION
    return partial


# %% [markdown]
# The check below has a row a criterion. Its *layer* says what is looked at: a *property* of the result,
# *parity* (the very same numbers as other ranks, or one rank alone, have), or a *resource* (messages,
# bytes). The first that is wrong ends the check.

# %%
check.ring_reduce_scatter(ring_reduce_scatter)

# %% [markdown]
# **Exercise 2: all-gather, and the whole.** Now rank r holds the finished chunk r. Send it to the right;
# what comes from the left you keep, and send on. Which chunk is it? Write each into its row of `x`. Four
# to six lines.

# %% nbgrader={"grade_id": "all_reduce", "solution": true}
# %%exercise L02
def ring_all_reduce(x, axis):
    """Sum `x` over the ranks, in place. `axis.size` divides `x.numel()`. Returns `x`."""
    n, rank = axis.size, axis.rank
    parts = x.view(n, -1)                                          # (N, numel/N), the same memory as x
    chunk = ring_reduce_scatter(parts, axis)                       # (numel/N,) finished, for row rank
    ### BEGIN SOLUTION
    parts[rank] = chunk
    for step in range(1, n):
        chunk = ring_shift(chunk, axis)                              # finished by rank - step
        parts[(rank - step) % n] = chunk
    ### END SOLUTION
    return x


# %%
check.ring_all_reduce(ring_all_reduce)

# %% [markdown]
# ## 4. Read the real one
# This is the module that nanoinfra's own tests trust. `tag` is a name for the ledger's rows, by which later
# lessons tell calls apart. Compare the rest with yours: you will be asked below what yours leaves out.

# %%
print(inspect.getsource(ring_collectives))

# %% [markdown]
# ## 5. Measure, compare, explain
# The ledger has a record for each ring_shift, with the bytes that were really handed to the wire: what was
# sent, as receiving has no row of its own here. They are *counted*: they must match exactly. The time is
# *timed*, and may be off by 10 %.

# %%
results = []


def bytes_sent():
    results[:] = world.run(trial, ring_all_reduce, N, S)
    return counted(max(sum(row.payload_bytes for row in ledger) for _, ledger in results), "B")


measure("L02.bytes", bytes_sent)
measure("L02.seconds", slowest, results)
compare_predictions(["L02.bytes", "L02.seconds"])

# %% [markdown]
# The ledgers of all ranks, as they ran: 2(N−1) exchanges, every rank busy from the first to the last. A
# bar is one call, from its begin to its end; in the gaps a rank adds, or waits for one of your laptop's
# cores.

# %%
comm_timeline([ledger for _, ledger in results], "one ring all-reduce in each rank's ledger", label="op",
              hidden=False)

# %% [markdown]
# **Is the ring always best?** It sends few bytes but many messages. A binomial tree sends 2·log₂N
# messages one after another, each the whole tensor: 2·log₂N·(α + S/β) seconds (`tree_all_reduce_seconds` in
# `formulas/collectives.py`). Small tensors pay for messages, large ones for bytes, so somewhere the curves
# cross. With 4 ranks the tree and the plain way need the same time: 2·log₂4 = 4.

# %%
def tree_all_reduce(x, axis):
    strides = [2**k for k in range((axis.size - 1).bit_length())]  # 1, 2, 4, ...
    for stride in strides:                                         # reduce towards rank 0
        if axis.rank % (2 * stride) == stride:
            comm.send(x, axis, dst=axis.rank - stride)
        elif axis.rank % (2 * stride) == 0 and axis.rank + stride < axis.size:
            x += comm.recv(torch.empty_like(x), axis, src=axis.rank + stride)
    for stride in reversed(strides):                               # and back out
        if axis.rank % (2 * stride) == 0 and axis.rank + stride < axis.size:
            comm.send(x, axis, dst=axis.rank + stride)
        elif axis.rank % (2 * stride) == stride:
            comm.recv(x, axis, src=axis.rank - stride)
    return x


sizes = [2**k for k in ((14, 17, 20) if FAST else (14, 16, 18, 20, 22))]
smooth = [2 ** (k / 16) for k in range(16 * 14, 16 * (20 if FAST else 22) + 1)]
models = {
    "ring": lambda s: ring_collective_seconds("all_reduce", s, N, ALPHA, BETA),
    "tree": lambda s: tree_all_reduce_seconds(s, N, ALPHA, BETA),
    "plain": lambda s: N * (ALPHA + s / BETA),                     # one copy in, N - 1 copies out, one by one
}
ways = {"ring": ring_all_reduce, "tree": tree_all_reduce, "plain": naive_all_reduce}
lines = {name: (smooth, [model(s) for s in smooth]) for name, model in models.items()}
points = {name: (sizes, [slowest(world.run(trial, way, N, s)).value for s in sizes])
          for name, way in ways.items()}
picture = draw.plot_curves(lines, points, "bytes of the tensor", "seconds", f"all-reduce over {N} ranks",
                           dashed_labels=["plain"])
crossing = next(s for s in smooth if models["ring"](s) < models["tree"](s))
draw.draw_vertical_line(picture, crossing, "from here on, ring before tree")
draw.label_x_axis_in_bytes(picture, sizes)

# %% [markdown]
# **Explain.** Four sentences. (a) Why is the measured time above the prediction and never below, and why
# by so much more for small tensors (10 to 20 % at 16 KiB, some 3 % at 4 MiB)? (b) Set the ring's and the
# tree's formula equal: from which size on does the ring win, and is the grey line there? (c) What happens
# to that size when N doubles? (d) What does nanoinfra's ring do that yours leaves out?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 4}
# <!-- ### BEGIN SOLUTION -->
# (a) The wire ends each message no sooner than α + bytes/β; copying, adding and waking up come on top,
# and each step waits for the slowest neighbour. That costs about the same time a step, whatever the size:
# much beside α alone, little beside a long transfer. (b) 2(N−1)α + 2(N−1)/N·S/β = 2·log₂N·(α + S/β) gives
# S = αβ·(N−1−log₂N) / (log₂N − (N−1)/N): with αβ = 80 kB, about 150 kB for 8 ranks, where the curves
# cross. (c) For 16 ranks it is about 290 kB: it grows nearly like N / log₂N, because the ring pays α for
# 2(N−1) messages. (d) It refuses a tensor that N does not divide, and says how far to pad; it takes one
# that is not contiguous (`reshape` and `copy_` where yours has `view`); it names its calls with a `tag`.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Here are rings that are wrong by one slip each, and the criteria of your check, in order. The first
# criterion that a ring does not meet rejects it. Guess which catches which.

# %%
mutants = [m for m in collect_lesson_mutants("02") if m.check is check.ring_all_reduce]
mutants = mutants[::4] if FAST else mutants
print("rings:", *(mutant.name for mutant in mutants), sep="\n    ")
print("criteria:", *(criterion.name for criterion in check.ring_all_reduce.criteria), sep="\n    ")

# %% [markdown]
# Now run. Some of them return the right sum. Why are they rejected all the same? Then grade your own file,
# `work/L02.py`, from a terminal in the project's folder: `make grade L=02`.

# %%
for mutant in mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %%
world.close()

# %% [markdown]
# ## 7. What came next
# In 2017 the ring replaced the parameter server in data-parallel training; lesson 03 hides its time behind
# the backward pass. ZeRO (2020) noticed that its two halves can be called apart: lesson 08. NCCL has trees
# for small tensors and rings for large ones, and chooses between them by a model like the one that you just
# drew.
#
# - Patarasuk and Yuan, *Bandwidth optimal all-reduce algorithms for clusters of workstations*, JPDC 2009.
# - Thakur, Rabenseifner and Gropp, *Optimization of collective communication operations in MPICH*, IJHPCA
#   2005.
