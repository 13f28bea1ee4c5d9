"""Ranks that rehearse a schedule idle as on the clock; the trainer's stage keeps and sends what is said."""
import pytest
import torch

from lessons.l06_pipeline.measurements import rehearse_schedule, run_pipeline_steps, schedule_of_order
from nanoinfra.config import ModelConfig
from nanoinfra.data.batch import Batch
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.parallel.pipeline.schedules import build_pipeline_schedule, gpipe, one_f_one_b, zb_h1
from nanoinfra.parallel.pipeline.simulator import simulate_schedule

KINDS = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)]
CONFIG = ModelConfig(61, 12, 4, 2, 2, 6, 48, 8, tied=False, family="gpt2")
M, B, T = 4, 2, 7


def batches():
    draws = [torch.Generator().manual_seed(k) for k in range(M)]
    return [Batch(*torch.randint(61, (2, B, T), generator=draw)) for draw in draws]


def test_anybodys_order_becomes_a_schedule():
    for kind, order in (("gpipe", gpipe), ("1f1b", one_f_one_b), ("zb-h1", zb_h1)):
        assert schedule_of_order(order, 3, 5) == build_pipeline_schedule(kind, 3, 5)


@pytest.mark.parametrize("kind, v", KINDS)
def test_ranks_count_the_slots_of_the_clock(ranks, kind, v):
    lists, times = build_pipeline_schedule(kind, 2, M, v), (2, 3, 4)
    clock = simulate_schedule(lists, *(t / v for t in times))
    for rank, [(_, counted)] in enumerate(ranks(2).run(rehearse_schedule, lists, times)):
        assert [span[1:] for span in counted] == [span[1:] for span in clock.compute_spans[rank]]
    assert clock.idle_seconds == [formulas.pipeline_idle_seconds(kind, 2, M, *times, v)] * 2


def test_who_goes_one_at_a_time_is_seen_to_idle(ranks):
    def serial(p, r, m):
        return sorted(gpipe(p, r, m), key=lambda what: what.micro_batch)
    least = formulas.pipeline_idle_seconds("1f1b", 2, M, 1, 1, 1)
    for [(_, counted)] in ranks(2).run(rehearse_schedule, schedule_of_order(serial, 2, M), (1, 1, 1)):
        assert counted[-1][2] - sum(end - begin for _, begin, end in counted) > least


def test_asleep_a_computation_takes_its_slots_and_stages_stand_side_by_side(ranks):
    results = ranks(2).run(rehearse_schedule, build_pipeline_schedule("1f1b", 1, 2), (1, 2, 3), 0.002,
                           repeats=2)
    for trials in results:
        assert len(trials) == 2
        for real, counted in trials:
            assert [end - begin for _, begin, end in counted] == [1, 5] * 2
            assert all(end - begin >= 0.002 * slots for (_, begin, end), slots in zip(real, [1, 5] * 2))


def test_a_real_step_keeps_and_sends_what_the_formulas_say(ranks):
    layer = sum(layer_activation_bytes_by_term(CONFIG, B, T, 8).values())
    (want,) = ranks(1).run(run_pipeline_steps, CONFIG, "1f1b", 1, 1, batches())
    for kind, v in KINDS:
        runs = ranks(2).run(run_pipeline_steps, CONFIG, kind, 2, v, batches())
        sent = [sum(row.payload_bytes for row in run["rows"] if row.op == "send") for run in runs]
        chunk = CONFIG.layers // (2 * v) * layer
        assert sent == formulas.pipeline_sent_bytes_per_stage(CONFIG, 2, M, B, T, 8, v)
        held = [formulas.predicted_micro_batches_in_flight(kind, 2, r, M, v) for r in range(2)]
        assert [run["kept"] for run in runs] == [chunk * n for n in held]
        assert sum(run["loss"] for run in runs) == pytest.approx(want["loss"], rel=1e-12)
        for run in runs:
            assert len(run["seconds"]) == 1
            for name, grad in run["grads"].items():
                torch.testing.assert_close(grad, want["grads"][name], rtol=1e-9, atol=1e-12)


def test_a_real_step_runs_the_lists_it_is_given(ranks):
    layer = sum(layer_activation_bytes_by_term(CONFIG, B, T, 8).values())
    runs = ranks(2).run(run_pipeline_steps, CONFIG, "1f1b", 2, 1, batches(),
                        lists=schedule_of_order(gpipe, 2, M), repeats=2)
    assert [run["kept"] for run in runs] == [M * 2 * layer] * 2
    assert [len(run["seconds"]) for run in runs] == [2, 2]
