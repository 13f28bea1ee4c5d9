# %% [markdown]
# # Lesson 08. ZeRO 1, 2, 3, and the parameter server it came from
# **2014 to 2020** · Li et al., *Scaling distributed machine learning with the parameter server*; Rajbhandari
# et al., *ZeRO: memory optimizations toward training trillion parameter models*.
#
# **Needs** a CPU. **Time** 90 minutes. **Builds on** lesson 01 (16 bytes a parameter), 02, 03.
#
# After this you can compute what each rank holds and sends at every stage of ZeRO, to the byte, say why the
# first stage costs nothing, and what the third one waits for.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os

import torch

from lessons.l08_zero import checks as check
from lessons.l08_zero.figures import gather_timeline, held_byte_bars, row_shard_map
from lessons.l08_zero.measurements import (
    STATE_KINDS,
    exposed_wait,
    measure_held_and_sent_bytes,
    run_layer_stack,
)
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.model_states import model_state_bytes
from nanoinfra.formulas.parameters import parameter_count, parameter_shapes
from nanoinfra.formulas.zero import zero_padded_numel
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.display_table import DisplayTable
from nanoinfra.lab.measure import counted, measure
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import last_prediction, predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.parallel.parameter_server import ParameterServer
from nanoinfra.parallel.zero import AllGatherBucket, ShardedParam, ZeroDataParallel

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
N, A = 4, 2                                  # ranks, micro-batches in a step
CONFIG = ModelConfig(vocab=253, width=48, layers=4, heads=4, kv_heads=2, head_dim=12, hidden=130, context=16)
LAYERS, WIDTH, REPEATS = 4, 128, 1 if FAST else 3                          # of the timed stack of matrices
SECONDS, ALPHA, BETA = (0.04, 1e-3, 5e6) if FAST else (0.12, 2e-3, 2e6)    # of backward a layer; the wire
world = RankPool(N, timeout=120)

# %% [markdown]
# ## 1. The wall
# Lesson 03 made N ranks nearly N times as fast. Take a step of it in mixed precision on 1, 2 and 4 ranks, and
# count what each one keeps.

# %%
held = {n: world.run(measure_held_and_sent_bytes, CONFIG, 0, n)[0][0] for n in (1, 2, 4)}
DisplayTable(f"data parallelism, {parameter_count(CONFIG):,} parameters: bytes on each rank",
             ("ranks", *STATE_KINDS,
              "all"),
             [(str(n), *(f"{b:,}" for b in kinds.values()), f"{sum(kinds.values()):,}")
              for n, kinds in held.items()])

# %%
xl = sum(model_state_bytes(parameter_count(config_for_size("xl")), "bfloat16").values())
print(f"GPT-2 xl: {xl / 1e9:.0f} GB on each rank, be it of 1 or of 1000. 64 ranks hold {64 * xl / 1e12:.2f} "
      f"TB, of which {63 * xl / 1e12:.2f} TB are copies")

# %% [markdown]
# Every rank holds all 16Ψ bytes. What does not fit one rank fits none, and most of that memory is copies.
#
# ## 2. Predict
# **The parameter server.** One more rank keeps weights and optimizer; W workers push it their gradients and
# pull new weights. All 2ΨW numbers pass *its* link. Cut the vector over S servers: 2ΨW/S each. Now put one
# of N slices on each worker itself. Push is then a reduce-scatter, pull an all-gather, and each link carries
# 2Ψ(N−1)/N, as in a ring all-reduce. The optimizer exists once, for the same bytes. That is **ZeRO-1**.
#
# **What is still kept whole?** That is all a stage says. With `a` micro-batches in a step:
# 1. gradients and weights are. Gradients leave once a step, weights come back once a step.
# 2. weights are. Gradients leave after *each* micro-batch; only the rows of their sum stay.
# 3. nothing is. Weights come for each forward and again for each backward, cast from their float32 masters.
#
# The paper's limit first. Then what it leaves out. A parameter of d₀ rows is cut into ⌈d₀/N⌉ rows a rank; the
# zeros that fill up the last are held, in what is still kept whole too, and sent. A tied head is a second
# *use* of the embedding, with a gradient of its own. Both are sent; at stage 1 both are kept whole until the
# step's end, at stages 2 and 3 only the rows of their sum stay. Stage 3 gathers the weight for each use, and
# keeps no 16-bit rows of the weights here, only their masters.

# %%
psi = parameter_count(CONFIG)                                              # the embedding once
whole = sum(zero_padded_numel(shape, N) for shape in parameter_shapes(CONFIG).values())    # with the zeros
used = whole + zero_padded_numel((CONFIG.vocab, CONFIG.width), N)                # and the head
t = ring_collective_seconds("all_gather", 4 * WIDTH**2, N, ALPHA,
                            BETA)          # s to gather a layer, or to scatter it
print(f"{N=} {A=} psi {psi:,}, with zeros {whole:,}, with both uses {used:,}; {LAYERS=}, each gathered in "
      f"{t * 1e3:.1f} ms, computes for {SECONDS * 500:.0f} ms forward, {SECONDS * 1e3:.0f} ms backward")

# %% [markdown]
# *Held*: weights, gradients, masters and moments, each at its most. *Sent*: the bytes that reduce-scatters
# take and all-gathers make in a step. (Weights and gradients are bfloat16, masters and moments float32.)
# *Server*: what the link of one float32 server carries in a step for N − 1 workers, in and out. *Wait*: stage
# 3 on a stack of LAYERS equal layers, where every transfer is waited for ("simple"), or where the next layer
# is fetched while one computes ("ahead"), in forward and, from the last layer on, in backward. Which
# transfers have nothing to hide behind then?

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L08.held_1", <formula>, "B")         and held_2, held_3: the paper's limit, then once more exactly
# predict("L08.sent_1", <formula>, "B")         and sent_2, sent_3: the same; the last call is compared
# predict("L08.server", <formula>, "B")
# predict("L08.wait_simple", <formula>, "s")    and "L08.wait_ahead"
### BEGIN SOLUTION
for once, uses, rows in ((psi, psi, 2), (whole, used, 0)):         # the paper's, then exactly
    predict("L08.held_1", 2 * once + 2 * uses + 12 * once / N, "B")
    predict("L08.held_2", 2 * once + 14 * once / N, "B")
    predict("L08.held_3", (14 + rows) * once / N, "B")
    predict("L08.sent_1", 2 * (uses + once), "B")
    predict("L08.sent_2", 2 * (A * uses + once), "B")
    predict("L08.sent_3", 2 * 3 * A * uses, "B")
predict("L08.server", 4 * 2 * psi * (N - 1), "B")
predict("L08.wait_simple", 3 * LAYERS * t, "s")
predict("L08.wait_ahead", 3 * t, "s")          # first gather forward, first backward, last scatter
### END SOLUTION

# %% [markdown]
# ## 3. Build
# One cut serves all stages: of every parameter, rank r has some rows. Drawn from the real one's `rows`:

# %%
def cuts():
    return ZeroDataParallel(Decoder(CONFIG), Mesh(dp=N).data, 1).row_ranges


first = [name for name in parameter_shapes(CONFIG) if name[:8] in ("embed.we", "blocks.0")]
row_shard_map(world.run(cuts), {name: parameter_shapes(CONFIG)[name] for name in first})

# %% [markdown]
# **Exercise 1: ZeRO-1.** `cut(x, n)` lays rows out for n ranks: 7 rows on 4 ranks become (4, 2, ...), the
# last one zeros, and `cut(p, n)[rank]` are yours. In the first step copy your rows of every parameter into
# `state`, and beside them `make([your rows, ...])`, an optimizer for them alone. In each step: a
# reduce-scatter of every gradient, (N, c, ...) → (c, ...), is your rows' `.grad`; the optimizer steps; an
# all-gather, (c, ...) → (N, c, ...), brings all new rows back into `params`, without the zeros.
# `comm.reduce_scatter(x, axis)`, `comm.all_gather(x, axis)`, `axis.rank` and `axis.size` are as in lesson 02.
# Seven to ten lines.

# %% nbgrader={"grade_id": "zero1", "solution": true}
# %%exercise L08
from math import ceil

from nanoinfra.distributed.comm import all_gather, reduce_scatter


def zero1_step(params, grads, axis, state, make):
    """Move `params` {name: (d0, ...)}, alike on all ranks, in place by `grads`, which differ: by their sum.

    `state` is {} at first and yours to keep. `make([tensors])` is an optimizer of torch for them.
    """
    ### BEGIN SOLUTION
    if not state:
        state["rows"] = {name: cut(p, axis.size)[axis.rank].clone() for name, p in params.items()}
        state["optimizer"] = make(list(state["rows"].values()))
    for name, mine in state["rows"].items():
        mine.grad = reduce_scatter(cut(grads[name], axis.size), axis)        # (N, c, ...) -> (c, ...)
    state["optimizer"].step()
    for name, p in params.items():
        rows = all_gather(state["rows"][name], axis)                         # (c, ...) -> (N, c, ...)
        p.copy_(rows.flatten(0, 1)[:len(p)])                                 # (d0, ...)
    ### END SOLUTION


def cut(x, n):
    """x (d0, ...) as (n, c, ...): c = ceil(d0 / n) rows a rank, and zeros after the last."""
    c = ceil(len(x) / n)
    rows = x.new_zeros(n * c, *x.shape[1:])
    rows[:len(x)] = x
    return rows.view(n, c, *x.shape[1:])


# %%
check.zero1_step(zero1_step)

# %% [markdown]
# **Exercise 2: ZeRO-3.** A parameter stays a (d₀, ...) tensor, but its memory comes and goes:
# `p.untyped_storage().resize_(0)` frees it, `.resize_(p.nbytes)` makes room, and `p.data.copy_(...)` fills it
# without autograd's notice. Make `gather` fill every parameter from all ranks' `shards`. It is needed before
# forward, and again when a gradient comes back to the output: `output.register_hook(gather)`. Free after
# forward. When autograd has p.grad, all is done with p: add its rows of the sum over ranks to `grads[name]`
# (that is stage 2), set `p.grad = None`, free p. Nine to thirteen lines.

# %% nbgrader={"grade_id": "zero3", "solution": true}
# %%exercise L08
def zero3(module, axis, shards, grads):
    """From now on the parameters of `module` are gathered (unsharded) only while it runs, then resharded.

    `shards[name]` (c, ...): your rows. `grads[name]` (c, ...): your rows of the gradient, added up in place.
    """
    params = dict(module.named_parameters())

    def gather(*_):
        for name, p in params.items():
            ### BEGIN SOLUTION
            p.untyped_storage().resize_(p.nbytes)
            p.data.copy_(all_gather(shards[name], axis).flatten(0, 1)[:len(p)])
            ### END SOLUTION

    def after_forward(module, inputs, output):
        ### BEGIN SOLUTION
        for p in params.values():
            p.untyped_storage().resize_(0)
        output.register_hook(gather)
        ### END SOLUTION

    def arrive(name, p):
        ### BEGIN SOLUTION
        grads[name] += reduce_scatter(cut(p.grad, axis.size), axis)
        p.grad = None
        p.untyped_storage().resize_(0)
        ### END SOLUTION

    module.register_forward_pre_hook(gather)
    module.register_forward_hook(after_forward)
    for name, p in params.items():
        p.untyped_storage().resize_(0)
        p.register_post_accumulate_grad_hook(lambda p, name=name: arrive(name, p))


# %%
check.zero3(zero3)

# %% [markdown]
# ## 4. Read the real one
# All three stages in one class. How many collectives does it make of your many? When does it send for the
# next unit? And at stage 1, whose memory are the `param_shards` of a float32 model (`ShardedParam`)?

# %%
for each in (ZeroDataParallel, ShardedParam, AllGatherBucket):
    print(inspect.getsource(each))

# %% [markdown]
# ## 5. Measure, compare, explain
# Held and sent are *counted*, on the tensors and by the ledger. The waits are *timed*, your stage 3 against
# the real one, with layers that sleep for as long as an accelerator would compute and an emulated wire
# (lesson 03).

# %%
def served(servers):
    """Inside each rank: bytes over its link in a step of the parameter server; bytes of Adam's moments."""
    mesh, net = Mesh(dp=N), Decoder(CONFIG)
    server = ParameterServer(net.parameters(), mesh.dp, torch.optim.Adam, servers)
    mesh.comm_log.take_records()
    server.step()
    state = server.optimizer.state.values() if server.is_server else ()
    return (sum(row.modelled_ring_bytes for row in mesh.comm_log.take_records()),
            sum(moment.nbytes for each in state for moment in each.values() if moment.dim()))


def simple(net, axis):
    for layer in net:
        shards = {name: cut(p.detach(), axis.size)[axis.rank].clone() for name, p in layer.named_parameters()}
        zero3(layer, axis, shards, {name: torch.zeros_like(shard) for name, shard in shards.items()})
    return (lambda: None), (lambda: None)


def ahead(net, axis):
    shared = ZeroDataParallel(net, axis, 3)
    return (lambda: (shared.zero_grad(), shared.prepare_for_backward(is_last=True))), shared.finish_grad_sync


stages = {stage: world.run(measure_held_and_sent_bytes, CONFIG, stage, N, A)[0] for stage in range(4)}
for stage, (kinds, _, rows) in stages.items():
    if stage:
        measure(f"L08.held_{stage}", counted, sum(kinds.values()), "B")
        measure(f"L08.sent_{stage}", counted, sum(row.payload_bytes for row in rows), "B")
links = {servers: world.run(served, servers) for servers in (1, 2, N)}
measure("L08.server", counted, links[1][0][0], "B")
waits = {way.__name__: world.run(run_layer_stack, way, LAYERS, WIDTH, SECONDS, (ALPHA, BETA), REPEATS)
         for way in (simple, ahead)}
for way, results in waits.items():
    measure(f"L08.wait_{way}", exposed_wait, results)
compare_predictions(list(check.PREDICTIONS))

# %% [markdown]
# What a rank keeps; grey is what was alive besides at the highest moment: activations, and whatever is on its
# way. A black line is your last prediction (16Ψ for data parallelism).

# %%
said = [16 * psi, *(last_prediction(f"L08.held_{stage}")[0] for stage in (1, 2, 3))]
held_byte_bars({f"stage {stage}" if stage else "data parallel": (kinds, peak, said[stage])
                for stage, (kinds, peak, _) in stages.items()},
               f"bytes on each of {N} ranks, {psi:,} parameters")

# %% [markdown]
# Rank 0 at stage 3, its last repeat; the table has the rank that waits least, so a busy machine shows less
# there, and a miss above 1 is such a machine: run the cell again. Pale: sent for and not waited for. How
# many layers are whole, or are prefetched, at a time?

# %%
gather_timeline({"yours": waits["simple"][0][-1], "the real one": waits["ahead"][0][-1]},
                "stage 3: a layer comes, computes and goes, forward and backward")

# %% [markdown]
# The ancestor, on the same ranks (every step waits for all; Li et al.'s servers did not). From line to line
# only the owners of the weights change. The last line is ZeRO-1.

# %%
DisplayTable("the parameter server, float32", ("servers", "workers", "bytes over the busiest link", "over 4Ψ",
                                               "Adam's moments on each rank, bytes"),
             [(str(s), str(N if s == N else N - s), f"{(most := max(link for link, _ in run)):,.0f}",
               f"{most / 4 / psi:.4g}", ", ".join(f"{moments:,}" for _, moments in run))
              for s, run in links.items()])

# %% [markdown]
# **Explain.** Five sentences. (a) What made the paper's limit miss, and why most at stage 1? (b) A ring
# carries no more bytes at stage 1 than in data parallelism: why, if the payload doubled? (c) With many
# micro-batches, which stage would you choose on a slow wire, and what does it cost? (d) The paper's stage 3
# holds 16Ψ/N; where have 2Ψ/N gone here? (e) Backward begins with the layer that forward has just freed. What
# would keeping it save, and what does it cost?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) Rows of zeros, and the head's own gradient, which stage 1 holds whole (and in a small model the
# embedding is a large part). (b) An all-reduce is a reduce-scatter and an all-gather: 2(N−1)/N of its
# payload, they (N−1)/N each of theirs. (c) Stage 1: 2Ψ however many, against (a+1)Ψ and 3aΨ; it keeps
# gradients whole. (d) The 16-bit weights are cast from the masters whenever they are gathered, and no shard
# of them is kept. (e) The gather that backward waits for first; one more layer is whole at the turn, when
# activations are at their most.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# Steps that are wrong by one slip each. Which of them would a loss curve show?

# %%
mutants = collect_lesson_mutants("08")
for mutant in mutants[5::12] if FAST else mutants:
    failure = mutant.check.report(mutant.variant).first_failure
    print(f"{mutant.check.name}: {mutant.name}\n    rejected by: {failure.criterion.name}")
    print(f"    {failure.text}")

# %%
world.close()

# %% [markdown]
# ## 7. What came next
# FSDP (2023) is stage 3 by units in PyTorch itself, with a limit on how many are fetched ahead. BLOOM cut
# optimizer state alone, inside tensor and pipeline parallelism (lesson 10): 3aΨ is dear between nodes. What
# does not fit N ranks either moves to the host's memory: ZeRO-Offload, PatrickStar (lesson 09).
#
# - Zhao et al., *PyTorch FSDP: experiences on scaling fully sharded data parallel*, VLDB 2023.
# - Ren et al., *ZeRO-Offload: democratizing billion-scale model training*, 2021.
