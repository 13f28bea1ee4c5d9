"""The replay counts what the formulas say, and the engine does what the replay does; pictures of both."""
import subprocess
import sys
from random import Random

import pytest
from matplotlib.colors import to_rgb

from lessons.l16_paging import figures as batches
from lessons.l16_paging.engine_runs import serve_trace
from lessons.l16_paging.replay import (
    LoggingScheduler,
    RuleScheduler,
    TraceRequest,
    random_trace,
    replay_three_policies,
    replay_trace,
    trace_sizes,
)
from nanoinfra.config import config_for_size
from nanoinfra.formulas import paged_kv_memory
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.serve.engine.block_pool import BlockPool
from nanoinfra.serve.generate_with_kv_cache import generate

LONGEST, SIZE = 64, 4
JOBS = random_trace(24, LONGEST, 1.5, 9)
MODEL = init_weights(Decoder(config_for_size("test")), 0).double()


def traces(n, most=20):
    """Any trace: bursts, pauses in which nobody is there, single tokens."""
    for seed in range(n):
        draw = Random(seed)
        arrivals = sorted(draw.randrange(draw.choice((1, 20, 200))) for _ in range(draw.randint(1, most)))
        yield [TraceRequest(at, tuple(draw.choices(range(256), k=draw.randint(1, 32))), draw.randint(1, 32))
               for at in arrivals]


def test_all_three_policies_take_the_formulas_steps():
    for jobs in traces(60):
        trace = trace_sizes(jobs)
        for seats in (1, 3, 5):
            runs = replay_three_policies(jobs, seats * LONGEST, LONGEST, SIZE)
            static, orca, pages = runs.values()
            assert static.steps == paged_kv_memory.static_batching_steps(trace, seats)
            assert orca.steps == paged_kv_memory.continuous_batching_steps(trace, seats)
            assert pages.steps >= paged_kv_memory.min_steps_with_kv_memory(trace, seats * LONGEST, SIZE)
            assert orca.steps >= paged_kv_memory.min_steps_with_kv_memory(trace, seats * LONGEST, SIZE,
                                                                          LONGEST)
        roomy = replay_trace(jobs, LoggingScheduler(BlockPool(400, SIZE)))
        assert roomy.steps == paged_kv_memory.unlimited_batching_steps(trace)
        assert max(step.used for step in roomy.log) == paged_kv_memory.peak_blocks_in_use(trace, SIZE)


def test_what_is_left_empty_is_the_formulas():
    kept = [paged_kv_memory.kv_tokens_at_end(prompt, new) for _, prompt, new in trace_sizes(JOBS)]
    for run, want in zip(replay_three_policies(JOBS, 4 * LONGEST, LONGEST, SIZE).values(),
                         ([LONGEST - n for n in kept], [LONGEST - n for n in kept],
                          [paged_kv_memory.unused_slots_in_last_block(n, SIZE) for n in kept])):
        assert [run.left[i] for i in range(len(JOBS))] == want


def test_in_a_static_batch_who_is_done_keeps_seat_and_memory():
    jobs = [TraceRequest(0, (1, 2), 3), TraceRequest(0, (3,), 1), TraceRequest(0, (4,), 1)]
    run = replay_trace(jobs, LoggingScheduler(BlockPool(2, 8)), static=2)
    assert [step.used for step in run.log] == [2, 2, 2, 1]
    assert [step.idle for step in run.log] == [(), (1,), (1,), ()]
    assert [step.waiting for step in run.log] == [{2: "waiting"}] * 3 + [{}]
    assert run.log[0].work == {0: (0, 2, "prompt"), 1: (0, 1, "prompt")}
    assert run.log[1].work == {0: (2, 1, "decode")} and run.log[2].empty == (8 - 4) + (8 - 1)


def test_in_a_pause_nothing_is_logged_and_the_clock_goes_on():
    run = replay_trace([TraceRequest(0, (1,), 2), TraceRequest(7, (1,), 1)], LoggingScheduler(BlockPool(4,
                                                                                                        4)))
    assert [step.at for step in run.log] == [0, 1, 7] and run.steps == 8


def test_a_shared_prefix_is_found_from_the_step_after_it_was_computed():
    prefix = tuple(range(18))
    jobs = [TraceRequest(job.arrival, prefix + job.tokens, job.new) for job in JOBS]
    later = sum(job.arrival > 0 for job in jobs)
    run = replay_trace(jobs, LoggingScheduler(BlockPool(200, SIZE)))
    assert run.counts["prefix_hits"] == SIZE * paged_kv_memory.blocks_saved_by_prefix_caching(18, 1 + later,
                                                                                              SIZE)
    fresh = replay_trace(jobs, LoggingScheduler(BlockPool(200, SIZE)), fresh=True)
    assert fresh.counts["prefix_hits"] == 0
    assert fresh.computed - run.computed == run.counts["prefix_hits"]


def test_a_job_that_the_pool_cannot_hold_ends_where_the_pool_does():
    run = replay_trace([TraceRequest(0, (1, 2, 3), 100)], LoggingScheduler(BlockPool(2, 2)))
    assert run.log[-1].used == 2 and run.left == {0: 0}


@pytest.mark.parametrize("blocks, size, limits", [
    pytest.param(64, 4, {}, marks=pytest.mark.prove), (4, 64, {}),
    pytest.param(28, 4, {"budget": 12}, marks=pytest.mark.prove),
    (30, 3, {"budget": 7, "seats": 5}), (200, 1, {})])
def test_the_engine_does_what_the_replay_does(blocks, size, limits):
    for jobs in (JOBS, [TraceRequest(job.arrival, (1,) * 9 + job.tokens[:9], min(job.new, 30))
                        for job in JOBS]):
        want = replay_trace(jobs, LoggingScheduler(BlockPool(blocks, size), **limits))
        engine, said, _ = serve_trace(MODEL, jobs, blocks, size, **limits)
        assert engine.scheduler.log == want.log and engine.scheduler.left == want.left
        assert {name: engine.stats()[name] for name in want.counts} == want.counts
        assert said == [list(generate(MODEL, list(job.tokens), job.new)) for job in jobs]
        assert engine.block_pool.num_used_blocks == 0


def test_the_engine_in_static_batches_takes_as_many_steps():
    engine, said, _ = serve_trace(MODEL, JOBS, 4, LONGEST, static=4)
    assert engine.scheduler.steps == paged_kv_memory.static_batching_steps(trace_sizes(JOBS), 4)
    assert [len(tokens) for tokens in said] == [job.new for job in JOBS]


def test_a_rule_of_ones_own_is_replayed_too():
    def one_at_a_time(running, waiting, blocks, budget):
        if not running and waiting:
            running.append(waiting.popleft())
        for sequence in running:
            count = len(sequence.tokens) - sequence.num_computed_tokens
            need = -(-len(sequence.tokens) // blocks.block_size) - len(sequence.block_table)
            sequence.block_table += [blocks.allocate() for _ in range(need)]
            yield sequence, sequence.num_computed_tokens, count
    run = replay_trace(JOBS, RuleScheduler(one_at_a_time, BlockPool(40, SIZE)))
    assert run.steps == paged_kv_memory.continuous_batching_steps(trace_sizes(JOBS), 1)


def test_the_trace_is_one_seeds_and_fits():
    assert random_trace(24, LONGEST, 1.5, 9) == JOBS and JOBS[0].arrival == 0
    assert all(len(job.tokens) + job.new <= LONGEST for job in random_trace(500, LONGEST, 0, 1))
    assert {job.arrival for job in random_trace(9, LONGEST, 0, 1)} == {0}


def test_it_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import lessons.l16_paging.replay"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def widths(picture, kind):
    """Steps that are drawn as of this kind."""
    return sum(bar.get_width() for bar in picture.figure.axes[0].patches
               if bar.get_facecolor()[:3] == to_rgb(batches._STEP_KINDS[kind][0]))


def test_the_timeline_has_every_step_of_everyone(tmp_path):
    run = replay_trace(JOBS, LoggingScheduler(BlockPool(28, SIZE), budget=12))
    picture = batches.batch_timeline({"pages": run}, "short of memory")
    kinds = [kind for step in run.log for *_, kind in step.work.values()]
    for kind in ("prompt", "decode", "again"):
        assert widths(picture, kind) == kinds.count(kind) > 0
    waits = [why for step in run.log for why in step.waiting.values()]
    for why in ("waiting", "preempted"):
        assert widths(picture, why) == waits.count(why) > 0
    lines = picture.figure.axes[0].lines
    crosses = [line for line in lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == run.counts["preemptions"] == 9
    said = [text.get_text() for text in picture.figure.axes[0].texts]
    assert said == ["pages: 90 steps, 6.7 tokens a step, 9 sent away"]
    assert picture.save(tmp_path / "timeline.png").stat().st_size > 10_000


def test_pictures_of_memory_and_of_many(tmp_path):
    runs = replay_three_policies(JOBS, 4 * LONGEST, LONGEST, SIZE)
    titles = [axes.get_title(loc="left") for axes in batches.pool_usage(runs).figure.axes]
    assert titles[-1] == "pages: 93% of what is taken holds a token" and len(titles) == 3
    half = replay_trace(JOBS, LoggingScheduler(BlockPool(64, SIZE)), until=15)
    numbered = [text.get_text() for text in batches.block_map(half).figure.axes[0].texts]
    assert len(numbered) == 64 and sum(map(bool, numbered)) == half.block_pool.num_used_blocks
    for picture in (batches.steps_over_pool_size(JOBS, (256, 512), LONGEST, SIZE),
                    batches.waste_over_block_size(JOBS, 1024, (2, 4))):
        assert picture.save(tmp_path / "picture.png").stat().st_size > 10_000
    assert [row[1] for row in batches.policy_table(runs).rows] == ["160", "83", "45"]
