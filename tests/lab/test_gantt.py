"""The Gantt picture has a box a computation, where the clock or the run put it."""
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_rgb

from lessons.l06_pipeline.figures import COMPUTE_COLOURS, IDLE_COLOUR, gantt_chart, measured_timeline
from nanoinfra.parallel.pipeline.schedules import Backward, Forward, ReduceGrads, build_pipeline_schedule
from nanoinfra.parallel.pipeline.simulator import simulate_schedule


def boxes(picture, colour=None):
    """(left, right, y) of each box drawn, or of those of one colour, without the legend's."""
    return [(bar.get_x(), bar.get_x() + bar.get_width(), bar.get_y() + bar.get_height() / 2)
            for bar in picture.figure.axes[0].patches
            if bar.get_width() and (colour is None or bar.get_facecolor()[:3] == to_rgb(colour))]


def test_every_computation_is_a_box_and_idle_lies_behind():
    clock = simulate_schedule(build_pipeline_schedule("1f1b", 2, 3), 1, 1, 1)
    picture = gantt_chart({"1F1B": clock}, "two stages", "slots")
    for kind in (Forward, Backward):
        want = [(begin, end) for spans in clock.compute_spans for what, begin, end in spans
                if isinstance(what, kind)]
        assert [box[:2] for box in boxes(picture, COMPUTE_COLOURS[kind])] == want
    assert [box[:2] for box in boxes(picture, IDLE_COLOUR)] == [(0, clock.step_seconds)] * 2
    texts = [text.get_text() for text in picture.figure.axes[0].texts]
    assert "1F1B: 12 slots, idle 25%" in texts and texts.count("2") == 2 * 2   # forward and back, two stages
    assert [tick.get_text() for tick in picture.figure.axes[0].get_yticklabels()] == ["stage 0", "stage 1"]


def test_panels_share_an_axis_and_later_chunks_are_pale(tmp_path):
    both = {"interleaved": simulate_schedule(build_pipeline_schedule("interleaved", 2, 2, 2), .5, .5, .5),
            "zero bubble": simulate_schedule(build_pipeline_schedule("zb-h1", 2, 2), 1, 1, 1)}
    picture = gantt_chart(both, "two ways", "ms")
    dark = boxes(picture, COMPUTE_COLOURS[Forward])
    assert len(dark) == 2 * 2 + 2 * 2                              # chunk 0 of the one, all of the other
    assert max(right for _, right, _ in boxes(picture)) == 1e3 * max(each.step_seconds
                                                                     for each in both.values())
    said = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert said == ["forward", "backward", "backward to the input", "backward to the weights",
                    "pale: later chunks", "idle"]
    assert picture.save(tmp_path / "gantt.png").stat().st_size > 10_000


def test_a_run_begins_at_0_and_a_computation_once_its_message_is_there():
    ranks = [[(Forward(0), 5.0, 6.0), (Backward(0), 6.0, 9.0), (ReduceGrads(), 9.0, 9.5)],
             [(Forward(0), 5.1, 7.0)]]
    waited = [SimpleNamespace(op="recv", wait_seconds=1, end_time=7.5),
              SimpleNamespace(op="barrier", wait_seconds=9, end_time=8)]
    late = [SimpleNamespace(op="recv", wait_seconds=0.9, end_time=6.0)]
    assert measured_timeline(ranks).compute_spans[0] == [(Forward(0), 0.0, 1.0), (Backward(0), 1.0, 4.0)]
    with_waits = measured_timeline(ranks, [waited, late])
    assert with_waits.compute_spans[0][1] == (Backward(0), 2.0, 4.0)
    assert with_waits.compute_spans[1] == [(Forward(0), pytest.approx(1.0), 2.0)]
    assert with_waits.idle_seconds == [1.0, pytest.approx(3.0)]
