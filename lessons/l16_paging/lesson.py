# %% [markdown]
# # Lesson 16. Pages and continuous batching
# **2022** · Yu et al., *Orca: a distributed serving system for transformer-based generative models*.
# **2023** · Kwon et al., *Efficient memory management for large language model serving with PagedAttention*.
#
# **Needs** a CPU. **Time** 90 minutes. **Builds on** lesson 15 (the KV cache); 06 for its pictures.
#
# After this you can compute what a server's KV memory wastes, how many steps a trace of requests takes under
# three policies, and write the block pool (with reference counts) and the scheduler (with chunked prefill and
# preemption) that make the difference.

# %%
# %load_ext nanoinfra.lab.exercise
import inspect
import os
from dataclasses import replace

from lessons.l16_paging import checks as check
from lessons.l16_paging import figures, replay
from lessons.l16_paging.engine_runs import serve_trace
from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.lab.compare_predictions import compare_predictions
from nanoinfra.lab.measure import counted, measure
from nanoinfra.lab.mutants import collect_lesson_mutants
from nanoinfra.lab.predict import predict
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.engine.scheduler import Scheduler
from nanoinfra.serve.generate_with_kv_cache import generate

FAST = "LESSON_FAST" in os.environ           # smaller sizes, the same code
LONGEST, SEATS, SIZE = 64, 4, 4              # tokens a sequence may have; caches that fit; tokens of a block
PLACES = SEATS * LONGEST                     # tokens that fit into KV memory
JOBS = replay.random_trace(24, LONGEST, gap=1.5, seed=9)
TRACE = replay.trace_sizes(JOBS)                        # (arrival, prompt, new) of each
PREFIX = tuple(range(18))                    # what a system prompt is made of

# %% [markdown]
# ## 1. The wall
# Lesson 15 left a cache: one stretch of memory for each sequence. Nobody knows how long an answer will be, so
# each is as long as the model's context. vLLM's example: OPT-13B in 16 bits leaves 12 of a GPU's 40 GB.

# %%
OPT = ModelConfig(50272, 5120, 40, 40, 40, 128, 20480, context=2048, family="opt")
whole = OPT.context * kv_cache_bytes_per_token(OPT, dtype_bytes=2)
print(f"{whole / 2048:,.0f} bytes a token, {whole / 1e9:.2f} GB for 2048: {12e9 // whole:.0f} sequences fit")

# %% [markdown]
# So batches are small; and a batch ends when its longest sequence does. Here is one small enough to look at:
# 24 requests that arrive over 22 steps, most of them short, and memory for 4 sequences of 64 tokens. A row is
# a request. A step gives each sequence of the batch one token; the first step of one reads its prompt.

# %%
STATIC = replay.replay_trace(JOBS, replay.LoggingScheduler(BlockPool(SEATS, LONGEST)), static=SEATS)
print(f"the first six requests, (arrival, prompt, new): {TRACE[:6]}")
figures.batch_timeline({"static batches": STATIC},
                       "a batch leaves when its longest is done: seats are kept, others wait")

# %% [markdown]
# ## 2. Predict
# A sequence of p prompt and o new tokens takes o steps: the first reads the prompt, and its last logits give
# a token. In memory are p + o − 1 at the end, because nobody reads keys and values of the last token.
#
# **Waste.** One stretch of the longest leaves the difference to that. Take blocks of s tokens as need be, and
# all but a sequence's last are full: at most s − 1 places are empty, (s − 1)/2 on average.
#
# **Steps.** *Static*: up to four of those that have come make a batch, which lasts as long as its longest.
# *Orca* plans each step anew: a sequence that is done leaves at once, and the one that has waited longest
# gets its memory. *Pages*: a sequence costs only the blocks that it has so far. If no step needs more blocks
# than there are, none ever waits, and each request ends as many steps after it came as it wants tokens.
#
# **Sharing.** Say all prompts begin with the same 18 tokens. A full block whose tokens are known to be the
# same as yours need not be computed or kept twice. Known is what an *earlier step* has computed.
#
# Commit seven numbers, all from `TRACE`. *Waste*: places of its memory that a sequence has left empty when it
# ends, added up, in stretches and in blocks. *Steps*: of the whole trace. *Peak*: blocks in use in the
# fullest step, if nobody waits. Is it more than there are? *Saved*: blocks that sequences do not compute as
# they come in, with `PREFIX` before all prompts.

# %% nbgrader={"grade_id": "predict", "solution": true}
# predict("L16.waste_whole", <formula>, "tokens")    and waste_pages: on average, then once more exactly
# predict("L16.steps_static", <number>, "steps")     and steps_orca, steps_paged
# predict("L16.peak", <number>, "blocks")            and saved
### BEGIN SOLUTION
kept = [prompt + new - 1 for _, prompt, new in TRACE]
predict("L16.waste_whole", sum(LONGEST - tokens for tokens in kept), "tokens")
predict("L16.waste_pages", len(TRACE) * (SIZE - 1) / 2, "tokens")                  # on average
predict("L16.waste_pages", sum(-tokens % SIZE for tokens in kept), "tokens")       # these
end, left = 0, list(TRACE)
while left:
    begin = max(end, left[0][0])
    batch = [new for arrival, _, new in left[:SEATS] if arrival <= begin]
    end, left = begin + max(batch), left[len(batch):]
predict("L16.steps_static", end, "steps")
ends = [0] * SEATS                                                   # when each seat is free
for arrival, _, new in TRACE:
    ends.sort()
    ends[0] = max(arrival, ends[0]) + new
predict("L16.steps_orca", max(ends), "steps")
last = max(arrival + new for arrival, _, new in TRACE)
predict("L16.steps_paged", last, "steps")
predict("L16.peak", max(sum(-(-(prompt + step - arrival) // SIZE) for arrival, prompt, new in TRACE
                            if arrival <= step < arrival + new) for step in range(last)), "blocks")
predict("L16.saved", sum(arrival > 0 for arrival, *_ in TRACE) * (len(PREFIX) // SIZE), "blocks")
### END SOLUTION

# %% [markdown]
# ## 3. Build
# The pool after step 14 of the trace, and the *block table* of sequence 18 (both counted from 0): where its
# tokens are. White blocks are free; pale is what a last block has left. Attention finds the blocks of a
# sequence through its table, as a process finds its memory through an operating system's pages.

# %%
BY_14 = replay.replay_trace(JOBS, replay.LoggingScheduler(BlockPool(PLACES // SIZE, SIZE)), until=15)
print(*(sequence.block_table for sequence, job in BY_14.order.items() if job == 18))
figures.block_map(BY_14, "64 blocks of 4 tokens; the number is the sequence (colours repeat)")

# %% [markdown]
# **Exercise 1: the pool.** A block has as many holders as there are tables with it: sequences that begin
# alike share blocks, and so do several answers to one prompt. When one of them is about to *write* into a
# block that another holds too, it gets a copy: `write(table, i)` puts a block of its own at `table[i]` and
# returns (old, new), what to copy where; None where it was its writer's alone. With a pool of three, table
# [2, 1], and block 1 shared once, `write(table, 1)` makes it [2, 0] and returns (1, 0). 12 to 18 lines.

# %% nbgrader={"grade_id": "pool", "solution": true}
# %%exercise L16
class Pool:
    """`n` blocks of `size` tokens, numbered from 0."""

    def __init__(self, n, size):
        self.block_size, self.free_blocks, self.ref_counts = size, list(range(n)), [0] * n

    def allocate(self):
        """A free block, for one holder. IndexError where none is free."""
        ### BEGIN SOLUTION
        block = self.free_blocks.pop()
        self.ref_counts[block] = 1
        return block
        ### END SOLUTION

    def incref(self, block):
        """One holder more."""
        ### BEGIN SOLUTION
        self.ref_counts[block] += 1
        ### END SOLUTION

    def free(self, table):
        """One holder less of each block. The table stays as it is. ValueError for one that nobody holds."""
        ### BEGIN SOLUTION
        for block in table:
            if self.ref_counts[block] < 1:
                raise ValueError(f"nobody holds block {block}")
            self.ref_counts[block] -= 1
            if not self.ref_counts[block]:
                self.free_blocks.append(block)
        ### END SOLUTION

    def write(self, table, i):
        """Before a write into table[i]: (from, to) to copy, or None. IndexError, and no change, if full."""
        ### BEGIN SOLUTION
        old = table[i]
        if self.ref_counts[old] == 1:
            return None
        table[i] = self.allocate()
        self.free([old])
        return old, table[i]
        ### END SOLUTION


# %%
check.Pool(Pool)

# %% [markdown]
# **Exercise 2: a step.** A sequence has `tokens`, of which the first `num_computed_tokens` are in the blocks
# of its `block_table`. Prompt, answer, going on after a preemption: all are one rule, *let computed catch
# up*. `plan` only plans; whoever runs the step adds to `num_computed_tokens`. Hand out `budget` tokens: to
# the list `running` in its order, as many as each lacks; then to the deque `waiting` in its order, and a
# sequence that is let in goes to the end of `running`. Prompts may go in chunks (chunked prefill), cut by the
# budget alone: a waiting sequence that finds too few `free_blocks` blocks goes on waiting.
#
# `missing` says how many blocks a sequence lacks, `start` takes them and makes the plan's entry. Where one of
# the running finds too few, their *last* gives its table back, forgets what was computed (`block_table = []`,
# `num_computed_tokens = 0`) and becomes the first that waits; again, until this one has room or was itself
# the last. If any was preempted, nobody comes in, in this step. Who waits sends nobody away, and nobody
# overtakes, even one that would fit. 15 to 20 lines.

# %% nbgrader={"grade_id": "plan", "solution": true}
# %%exercise L16
from math import ceil


def plan(running, waiting, blocks, budget):
    """[(sequence, its first token, how many)] of one step. Both queues are as they are to be afterwards."""
    ### BEGIN SOLUTION
    work, before = [], list(running)
    for sequence in before:
        count = min(budget, len(sequence.tokens) - sequence.num_computed_tokens)
        while sequence in running and missing(sequence, count, blocks) > len(blocks.free_blocks):
            last = running.pop()
            blocks.free(last.block_table)
            last.block_table, last.num_computed_tokens = [], 0
            waiting.appendleft(last)
        if count and sequence in running:
            work.append(start(sequence, count, blocks))
            budget -= count
    while budget and waiting and len(running) >= len(before):
        count = min(budget, len(waiting[0].tokens))
        if missing(waiting[0], count, blocks) > len(blocks.free_blocks):
            break
        running.append(waiting.popleft())
        work.append(start(running[-1], count, blocks))
        budget -= count
    return work
    ### END SOLUTION


def missing(sequence, count, blocks):
    """Blocks that it lacks for its next `count` tokens."""
    return ceil((sequence.num_computed_tokens + count) / blocks.block_size) - len(sequence.block_table)


def start(sequence, count, blocks):
    """Take them; the plan's entry."""
    sequence.block_table += [blocks.allocate() for _ in range(missing(sequence, count, blocks))]
    return sequence, sequence.num_computed_tokens, count


# %%
check.plan(plan)

# %% [markdown]
# ## 4. Read the real one
# What does `_admit` do that yours does not, and why may a hit not cover all of a prompt (`_usable_hashes`)?
# Blocks stay in `hash_to_block` by a hash of all tokens up to their end: why not of their own alone? In which
# order does `free` go through a table, and why?

# %%
for it in (Scheduler.schedule, Scheduler._admit, Scheduler._usable_hashes, Scheduler._make_room, BlockPool):
    print(inspect.getsource(it))

# %% [markdown]
# ## 5. Measure, compare, explain
# Blocks as long as the longest sequence, one each, are Orca's stretches. So the real scheduler replays the
# trace three times in the same memory, and its log is counted.

# %%
RUNS = replay.replay_three_policies(JOBS, PLACES, LONGEST, SIZE)
_, ORCA, PAGES = RUNS.values()
ALIKE = [replace(job, tokens=PREFIX + job.tokens) for job in JOBS]
SHARED = replay.replay_trace(ALIKE, replay.LoggingScheduler(BlockPool(PLACES // SIZE, SIZE)))
measure("L16.waste_whole", counted, sum(ORCA.left.values()), "tokens")
measure("L16.waste_pages", counted, sum(PAGES.left.values()), "tokens")
for name, run in zip(("static", "orca", "paged"), RUNS.values()):
    measure(f"L16.steps_{name}", counted, run.steps, "steps")
measure("L16.peak", counted, max(step.used for step in PAGES.log), "blocks")
measure("L16.saved", counted, SHARED.counts["prefix_hits"] // SIZE, "blocks")
compare_predictions(list(check.PREDICTIONS))

# %%
figures.batch_timeline(RUNS, "24 requests, memory for 256 tokens")

# %%
figures.pool_usage(RUNS, "the same memory, and what it holds: in static batches also tokens of who is done")

# %% [markdown]
# **Short of memory.** Less than half of the blocks, and 12 tokens a step: prompts go in chunks, and the
# sequence that came last is preempted. Your `plan` on your `Pool`, and the real one, where a sequence that
# comes back may find its own blocks still known. In the table *a step* is of all that was computed, again or
# not.

# %%
YOURS = replay.replay_trace(JOBS, replay.RuleScheduler(plan, Pool(28, SIZE), budget=12))
REAL = replay.replay_trace(JOBS, replay.LoggingScheduler(BlockPool(28, SIZE), budget=12))
figures.batch_timeline({"yours": YOURS, "the real one": REAL}, "28 blocks, 12 tokens a step")

# %%
APART = replay.replay_trace(ALIKE, replay.LoggingScheduler(BlockPool(PLACES // SIZE, SIZE)), fresh=True)
figures.policy_table(RUNS | {"yours, 28 blocks": YOURS, "real, 28 blocks": REAL, "prefix, not shared": APART,
                             "prefix, shared": SHARED},
                     "counted; a block of the first two rows has 64 places, else 4")

# %% [markdown]
# **The real engine** runs the same traces: a decoder, drawn at random, in float64. Its log must be the
# replay's, step by step, and what each request says must be what it says alone. (`prefix_hits` counts as a
# request comes in first, not as it comes back; `prompt_tokens` counts what is read again, too.)

# %%
model = init_weights(Decoder(config_for_size("test")), seed=0).double()
alone = [list(generate(model, list(job.tokens), job.new)) for job in JOBS]
for run in (ORCA, PAGES, REAL):
    blocks = run.block_pool
    engine, said, seconds = serve_trace(model, JOBS, len(blocks.ref_counts), blocks.block_size,
                                        budget=run.max_num_batched_tokens)
    stats = {name: engine.stats()[name] for name in run.counts}
    assert engine.scheduler.log == run.log and stats == run.counts and said == alone
    print(f"{len(blocks.ref_counts)} blocks of {blocks.block_size}: {stats}, as replayed, in {seconds:.2f} s")

# %% [markdown]
# **More memory.** Many requests, all there at once. Memory times steps must hold everyone's blocks for as
# long as they run: lines (predicted: at least) are that bound, dots replays. And what other sizes leave.

# %%
MANY = replay.random_trace(60 if FAST else 400, LONGEST, gap=0, seed=3)
figures.steps_over_pool_size(MANY, [n * LONGEST for n in ((2, 4, 8) if FAST else (2, 4, 8, 16))], LONGEST,
                             SIZE)

# %%
figures.waste_over_block_size(MANY, 16 * LONGEST, (2, 4, 8, 16, 32))

# %% [markdown]
# **Explain.** Five sentences. (a) Static takes twice Orca's steps with the same four seats: what does each
# add up? (b) In 128 places Orca's dot lies on its bound and that of pages 8 % above: what do pages pay where
# memory is short? In 1,024 both lie higher, though few are preempted: what does a bound over all steps leave
# out at a trace's end? (c) Blocks of one token waste nothing: why are vLLM's 16 long? (d) Why is the *last*
# preempted, not the one with most blocks? (e) Three computed all of the prefix, all 24 its last two tokens:
# why?

# %% [markdown] nbgrader={"grade_id": "explain", "solution": true, "grade": true, "points": 5}
# <!-- ### BEGIN SOLUTION -->
# (a) Static the longest answer of each batch, Orca all answers over four seats, and some idle ones at the
# end. (b) Nothing is reserved, so a growing sequence preempts others: their tokens are computed again, and
# what they gave is free until the first that waits fits in. The bound has memory full to the end; the last
# answers run there alone. (c) Each needs an entry, a look-up, a hash; kernels read whole blocks; 7.5 places
# of hundreds are little. (d) The first to come gets done, whatever comes later; else two could preempt each
# other for ever. (e) They came in one step, when nothing was known; 18 tokens fill four blocks, only full
# ones have keys.
# <!-- ### END SOLUTION -->

# %% [markdown]
# ## 6. Break it
# One slip each (a few of them where LESSON_FAST is set). Which of them would a user notice, and how? Your own
# file, `work/L16.py`, is graded from a terminal in this project: `make grade L=16`.

# %%
mutants = collect_lesson_mutants("16")
for each in mutants[3::9] if FAST else mutants:
    failure = each.check.report(each.variant).first_failure
    print(f"{each.check.name}: {each.name}\n    rejected by: {failure.criterion.name}\n    {failure.text}")

# %% [markdown]
# ## 7. What came next
# SGLang keeps known prefixes in a tree, not in a table of hashes, and takes first who shares most. A long
# prompt still makes everyone else's token late: Sarathi's chunks bound that, DistServe gives prompts and
# answers machines of their own. A thousand adapters can live in the same pages (lesson 17).
#
# - Zheng et al., *SGLang: efficient execution of structured language model programs*, 2024 (RadixAttention).
# - Agrawal et al., *Taming throughput-latency tradeoff in LLM inference with Sarathi-Serve*, 2024.
