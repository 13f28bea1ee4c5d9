"""The virtual clock: idle times are the exact forms, and it replays more than pipelines."""
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoinfra.formulas import pipeline
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import SimulatedTask, simulate_schedule, simulate_tasks

TIMES = list(product((1, 2, 5), (1, 2, 3), (1, 2, 7)))


@pytest.mark.parametrize("kind, v", [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3),
                                     ("zb-h1", 1)])
def test_idle_time_is_the_exact_form(kind, v):
    done = 0
    for p, m in product(range(2, 7), (1, 2, 3, 4, 5, 6, 8, 12)):
        if kind == "interleaved" and m % p:
            continue
        lists = build_pipeline_schedule(kind, p, m, v)
        for F, B, W in TIMES:
            if kind == "zb-h1" and m < p and W > min(F, B):
                continue                     # the formula refuses it: see test_formulas
            got = simulate_schedule(lists, F / v, B / v, W / v)
            want = pipeline.pipeline_idle_seconds(kind, p, m, F, B, W, v)
            assert got.idle_seconds == pytest.approx([want] * p, abs=1e-9), (kind, p, m, v, F, B, W)
            assert got.step_seconds == pytest.approx(m * (F + B + W) + want)
            done += 1
    assert done > 100


def test_peak_is_counted_from_what_the_clock_saw():
    for kind, p, m, v in (("gpipe", 4, 6, 1), ("1f1b", 4, 6, 1), ("zb-h1", 4, 6, 1),
                          ("interleaved", 3, 6, 2)):
        assert simulate_schedule(build_pipeline_schedule(kind, p, m, v), 1, 1, 1).peak_in_flight == [
            pipeline.predicted_micro_batches_in_flight(kind, p, r, m, v) for r in range(p)]


@given(st.integers(2, 5), st.integers(1, 8), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.1, 3),
       st.floats(0, 2))
def test_messages_only_delay_and_nobody_overlaps_himself(p, m, F, B, W, send):
    free, slow = (simulate_schedule(build_pipeline_schedule("1f1b", p, m), F, B, W, t) for t in (0.0, send))
    assert slow.step_seconds >= free.step_seconds - 1e-9
    assert slow.step_seconds >= m * (F + B + W) + (p - 1) * (F + B + W + 2 * send) - 1e-9   # fill and drain
    for spans in slow.compute_spans:
        assert all(end <= begin + 1e-9 for (_, _, end), (_, begin, _) in zip(spans, spans[1:]))


def test_a_slow_stage_sets_the_pace():
    even, slow = (simulate_schedule(build_pipeline_schedule("1f1b", 3, 9), t, t, t)
                  for t in ([1, 1, 1], [1, 2, 1]))
    assert even.step_seconds == 9 * 3 + 2 * 3
    assert slow.idle_seconds[1] == 1 + 1 + 2  # for its first input, the first answer, stage 0's last work
    assert slow.step_seconds == 9 * 6 + 4 and slow.idle_seconds[0] == slow.step_seconds - 9 * 3


def test_data_parallel_overlap_is_replayed_too():
    """Four layers of 1 s, a bucket each on the wire: of 0.8 s only the last shows; of 1.5 s they queue."""
    def waits(seconds):
        tasks = {}
        for k in range(4):
            tasks["backward", k] = SimulatedTask("rank", 1.0)
            tasks["bucket", k] = SimulatedTask("wire", seconds, (("backward", k),))
        return simulate_tasks(tasks)["bucket", 3][1] - 4.0
    assert waits(0.8) == pytest.approx(0.8) and waits(1.5) == pytest.approx(1 + 4 * 1.5 - 4)


def test_a_circle_is_named():
    with pytest.raises(ValueError, match="nobody can go on: a waits for .'b'."):
        simulate_tasks({"a": SimulatedTask(0, 1.0, ("b",)), "b": SimulatedTask(1, 1.0, ("a",))})
