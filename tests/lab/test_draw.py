import io

import pytest
from PIL import Image

from lessons.l02_ring_all_reduce import figures
from nanoinfra.distributed.comm_log import CommRecord as LedgerRow
from nanoinfra.lab import draw

RING = [[2 if c == (r - 2) % 4 else 1 for c in range(4)] for r in range(4)]
LEDGERS = [[LedgerRow("all_reduce", "dp", f"bucket {i}", 2, 8, i, i, i + 0.5, 0.1) for i in range(3)]
           for rank in range(2)]


def texts(picture):
    axes = picture.figure.axes[0]
    return [t.get_text() for t in (*axes.texts, *axes.get_yticklabels(), *axes.get_xticklabels())]


def test_a_timeline_has_a_line_a_rank_and_shows_what_was_waited_for():
    picture = figures.comm_timeline(LEDGERS)
    assert {"rank 0", "rank 1"} <= set(texts(picture))
    bars = [bar for bar in picture.figure.axes[0].patches if bar.get_width()]
    assert len(bars) == 2 * 2 * 3
    waited = [bar.get_width() for bar in bars[1::2]]
    assert waited == pytest.approx([100] * 6)                      # ms


def test_a_timeline_without_hiding_shows_whole_calls_and_no_pale():
    axes = figures.comm_timeline(LEDGERS, hidden=False).figure.axes[0]
    assert [bar.get_width() for bar in axes.patches if bar.get_width()] == pytest.approx([500] * 12)
    assert not [text for text in axes.get_legend().get_texts() if "hidden" in text.get_text()]


def test_a_ring_names_ranks_counts_and_what_is_sent():
    got = texts(figures.ring_diagram(RING, sent=[(r - 2) % 4 for r in range(4)]))
    assert {"rank 3", "chunk 1", "2", "1"} <= set(got)
    assert got.count("2") == 4


def test_curves_pair_a_line_with_its_points():
    picture = draw.plot_curves({"ring": ([2, 4], [1, 2])}, {"ring": ([2, 4], [1.1, 2.1])}, "bytes", "seconds")
    line, points = picture.figure.axes[0].lines
    assert line.get_color() == points.get_color()
    picture = draw.plot_curves({"a": ([2, 4], [1, 2]), "b": ([2, 4], [1, 2])}, {"b": ([2, 4], [1, 2])},
                               "x", "y",
                               dashed_labels=["b"])
    under, over, dots = picture.figure.axes[0].lines
    assert (under.get_linestyle(), over.get_linestyle(), dots.get_markerfacecolor()) == ("-", "--", "none")
    assert "from here" in texts(draw.draw_vertical_line(picture, 3, "from here"))
    draw.label_x_axis_in_bytes(picture, [2**16, 2**22])
    assert {"64 KiB", "4 MiB"} <= set(texts(picture))


def test_a_picture_saves_itself_and_shows_itself(tmp_path):
    picture = figures.comm_timeline(LEDGERS, "what happened")
    with Image.open(picture.save(tmp_path / "x.png")) as saved:
        assert saved.width > 1200
    data, about = picture._repr_png_()
    assert Image.open(io.BytesIO(data)).width > 1.5 * about["width"] and about["alt"] == "what happened"
