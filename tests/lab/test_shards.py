"""What the lesson on ZeRO counts and times is what the formulas say; a picture shows what it was given."""
import pytest

from lessons.l08_zero.figures import gather_timeline, held_byte_bars, row_shard_map
from lessons.l08_zero.measurements import (
    STATE_KINDS,
    exposed_wait,
    measure_held_and_sent_bytes,
    run_layer_stack,
)
from nanoinfra.config import config_for_size
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.zero import zero_model_state_bytes, zero_payload_bytes
from nanoinfra.parallel.zero import ZeroDataParallel

CONFIG = config_for_size("test", tied=False,
                         vocab=259)                      # 259 rows leave a remainder on two ranks
WIRE = (1e-3, 4e6)


def texts(picture):
    axes = picture.figure.axes[0]
    found = (*axes.texts, *axes.get_yticklabels(), *axes.get_legend().get_texts())
    return {text.get_text().strip() for text in found}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_held_and_sent_are_the_formulas(ranks, stage):
    want = zero_model_state_bytes(CONFIG, 2, stage, "bfloat16")
    moments = want["exp_avg"] + want["exp_avg_sq"]
    for kinds, peak, rows in ranks(2).run(measure_held_and_sent_bytes, CONFIG, stage, 2, micro_batches=3):
        assert kinds == dict(zip(STATE_KINDS, (want["weights"], want["gradients"], want["master"], moments)))
        assert sum(kinds.values()) < peak < sum(kinds.values()) + 8 * 4 * 259 * 32 + 300_000
        sent = zero_payload_bytes(CONFIG, 2, stage, 3, "bfloat16")
        assert {op: sum(row.payload_bytes for row in rows if row.op == op) for op in sent} == sent


def test_a_stack_that_nothing_cuts_waits_for_nothing_and_notes_forward_and_backward(ranks):
    results = ranks(2).run(run_layer_stack, uncut, 2, 4, 0.01, WIRE, 2)
    assert exposed_wait(results).value == 0
    for (first, second), _ in results[0]:
        moments = [first[0], first[1], second[0], second[1], second[2], second[3], first[2], first[3]]
        assert moments == sorted(moments) and moments[-1] - moments[0] >= 2 * (0.005 + 0.01)


@pytest.mark.timed
def test_the_exposed_wait_is_that_of_two_gathers_and_a_scatter(ranks):
    t = ring_collective_seconds("all_gather", 4 * 128 * 128, 2, *WIRE)
    got = exposed_wait(ranks(2).run(run_layer_stack, by_zero, 3, 128, 0.04, WIRE, 3))
    assert got.n == 3 and 2.5 * t < got.value < 5 * t                  # of nine transfers


def test_a_shard_map_has_each_ranks_rows_and_hatches_what_is_padding():
    picture = row_shard_map([{"w": (0, 2), "b": (0, 1)}, {"w": (2, 3), "b": (1, 2)}],
                            {"w": (3, 5), "b": (2,)})
    assert {"rank 0", "rank 1", "w", "b", "(3, 5): 2 rows a rank", "(2,): 1 rows a rank"} <= texts(picture)
    bars = picture.figure.axes[0].patches
    assert sorted(bar.get_width() for bar in bars) == [1, 1, 1, 1, 2]
    assert [bar.get_x() for bar in bars if bar.get_hatch()] == [3]


def test_bars_of_bytes_show_kinds_the_peak_and_the_prediction():
    rows = {"whole": ({"weights": 3_000_000, "moments": 5_000_000}, 9_000_000, 8_000_000),
            "cut": ({"weights": 3_000_000, "moments": 1_000_000}, 6_000_000, 4_100_000)}
    picture = held_byte_bars(rows, "bytes")
    assert {"whole", "cut", "kept: 50%", "weights", "moments", "predicted"} <= texts(picture)
    axes = picture.figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([3, 5, 1, 3, 1, 2])
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([8, 4.1])


def test_a_timeline_of_layers_shows_uses_and_waits(ranks):
    times, rows = ranks(2).run(run_layer_stack, by_zero, 2, 8, 0.0, WIRE, 1)[0][0]
    picture = gather_timeline({"real": (times, rows)}, "two layers")
    assert {"real, layer 0", "real, layer 1"} <= texts(picture)
    assert any(text.startswith("waits") for text in texts(picture))
    assert len(picture.figure.axes[0].patches) == 4 + 2 * (4 + 2)      # uses; transfers, twice each


def uncut(net, axis):
    return (lambda: None), (lambda: None)


def by_zero(net, axis):
    shared = ZeroDataParallel(net, axis, 3)
    return (lambda: (shared.zero_grad(), shared.prepare_for_backward(is_last=True))), shared.finish_grad_sync
