"""Pictures are made of what they were given: lengths of bars, points of curves, shares of histograms."""
import pytest
import torch

from lessons.l01_memory.figures import (
    bytes_after_each_operator,
    bytes_over_step,
    float16_histogram,
    loss_curves,
    stacked_byte_bars,
)
from lessons.l04_recompute.figures import saved_tensor_bars
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes


def test_stacked_bars_are_as_long_as_their_bytes():
    axes = stacked_byte_bars({"one": {"a": 4_000_000, "c": 2_000_000},
                              "two": {"a": 1_000_000, "b": 3_000_000, "c": 500_000}}).figure.axes[0]
    got = [(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_width()]
    assert got == [(0, 4), (4, 2), (0, 1), (1, 3), (4, 0.5)]
    assert [text.get_text().strip() for text in axes.texts] == ["6 MB", "4.5 MB"]
    assert axes.get_legend_handles_labels()[1] == ["a", "b", "c"]


def test_each_tensor_has_a_bar_and_a_name():
    tensors = torch.zeros(2, 500), torch.zeros(3, 5, 5), torch.zeros(250)
    axes = saved_tensor_bars(tensors, ("input", "softmax", "v"), 5, "t").figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [4, 0.3, 1]
    want = ["input  (2, 500)", "softmax  (3, 5, 5)", "v  (250,)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == want
    assert len({bar.get_facecolor() for bar in axes.patches}) == 3
    with pytest.raises(ValueError, match="longer"):
        saved_tensor_bars(tensors, ("input", "softmax"), 5, "t")


def test_during_gives_the_bytes_after_each_operator_of_an_act_alone():
    kept = []
    with LiveTensorBytes(mark_operators=True) as storages:
        kept.append(torch.zeros(5))
        assert bytes_after_each_operator(storages, lambda: kept.append(kept[0] + 1)) == [40]
        assert bytes_after_each_operator(storages, kept.clear) == []
        assert bytes_after_each_operator(storages, lambda: torch.ones(2)) == [8]


def test_over_step_draws_each_phase_equally_wide():
    axes = bytes_over_step({"x": [[1_000_000, 3_000_000], [2_000_000]]}, ("forward", "update"),
                           ("all", 2_500_000), "t").figure.axes[0]
    curve, line = axes.lines[:2]
    assert list(curve.get_xdata()) == [0, 0.5, 1, 2] and list(curve.get_ydata()) == [1, 1, 3, 2]
    assert curve.get_label() == "x: at most 3 MB" and line.get_ydata()[0] == 2.5


def test_float16_zero_and_range():
    numbers = torch.tensor([2.0**-30, -(2.0**-26), 2.0**-10, 0.0])
    axes = float16_histogram({"as they are": numbers, "times 2^10": numbers * 2**10}, "t").figure.axes[0]
    want = ["as they are: 75% become zero", "times 2^10: 25% become zero"]
    assert axes.get_legend_handles_labels()[1] == want
    assert (numbers.half() == 0).float().mean().item() == pytest.approx(0.75)


def test_losses_that_agree_are_all_seen():
    axes = loss_curves({"wide": ([1, 2], [0.5, 0.25]), "narrow": ([1, 2], [0.5, 0.25])}, "t").figure.axes[0]
    below, above = axes.lines
    assert list(below.get_xdata()) == [1, 2] and list(above.get_ydata()) == [0.5, 0.25]
    assert below.get_linewidth() > above.get_linewidth() + 2 and below.get_linestyle() == "-"
    assert axes.get_legend_handles_labels()[1] == ["wide", "narrow"]
