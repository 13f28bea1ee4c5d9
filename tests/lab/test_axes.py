"""What lesson 10 runs and draws: the trainer's step on a mesh against one rank and the formulas."""
import math

import pytest
import torch

from lessons.l10_three_d.cluster_tables import BLOOM_TRIALS, GPT3_COLUMNS, bloom_trials_table, gpt3_on_mesh
from lessons.l10_three_d.figures import (
    mesh_cubes,
    payload_bytes_by_axis,
    stacked_axis_bars,
    time_emulated_steps,
)
from nanoinfra.config import ModelConfig
from nanoinfra.distributed.comm_log import CommRecord
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.communication_by_axis import step_bytes_by_axis
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.lab import draw
from nanoinfra.lab.instruments.gradient_parity import (
    float64_train_flags,
    largest_gradient_error,
    run_gradient_step,
)

CONFIG = ModelConfig(vocab=61, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, hidden=24, context=8)
B, T, G = 2, 8, 8
ONE = {"pp": 1, "dp": 1, "tp": 1}


def own_norm(grads, mesh, ends):
    return len(grads), ends and ends.rank


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 1), (1, 1, 4), (1, 2, 2)])
def test_a_step_on_a_mesh_is_one_rank_s_and_sends_what_the_formulas_say(ranks, sizes):
    alone = ranks(1).run(run_gradient_step, CONFIG, float64_train_flags(ONE, B, G), T)[0]
    runs = ranks(4).run(run_gradient_step, CONFIG, float64_train_flags(dict(zip(ONE, sizes)), B, G), T,
                        norm_function=own_norm)
    want = {name: grad for name, (_, grad) in alone["grads"].items()}
    assert largest_gradient_error([run["grads"] for run in runs], want) < 1e-12
    assert sum(run["loss"] for run in runs) / sizes[2] == pytest.approx(alone["loss"], rel=1e-12)
    m = G // (B * sizes[1])
    for run in runs:
        at = run["at"]
        assert run["norm"] == pytest.approx(alone["norm"], rel=1e-12)
        assert run["own"] == (len(run["grads"]), at["pp"])                       # two stages: both are ends
        assert payload_bytes_by_axis(run["rows"]) == step_bytes_by_axis(CONFIG, *sizes, B, T, m, 8, at["pp"],
                                                                        at["tp"])
    assert [tuple(run["at"][axis] for axis in ONE) for run in runs] == [
        (i, j, k) for i in range(sizes[0]) for j in range(sizes[1]) for k in range(sizes[2])]


@pytest.mark.prove
@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 1, 2), (2, 1, 4), (1, 8, 1)])
def test_so_it_is_on_more_ranks(ranks, sizes):
    alone = ranks(1).run(run_gradient_step, CONFIG, float64_train_flags(ONE, B, G), T)[0]
    runs = ranks(math.prod(sizes)).run(run_gradient_step, CONFIG,
                                       float64_train_flags(dict(zip(ONE, sizes)), B, G), T)
    want = {name: grad for name, (_, grad) in alone["grads"].items()}
    assert largest_gradient_error([run["grads"] for run in runs], want) < 1e-12
    if sizes[1] < 8:                         # eight data ranks have a sequence each, half a micro-batch
        for run in runs:
            at, m = run["at"], G // (B * sizes[1])
            assert payload_bytes_by_axis(run["rows"]) == step_bytes_by_axis(CONFIG, *sizes, B, T, m, 8,
                                                                            at["pp"],
                                                                            at["tp"])


def test_layers_take_their_nap_and_ranks_wait_for_every_axis(ranks):
    wire, sizes = {"pp": (5e-3, 1e6), "dp": (1e-3, 1e6), "tp": (1e-3, 1e6)}, {"pp": 2, "dp": 1, "tp": 2}
    one = ring_collective_seconds("all_reduce", 8 * B * T * 16, 2, *wire["tp"])
    messages = 2 * ring_collective_seconds("send", 8 * B * T * 16, 2,
                                           *wire["pp"])          # of the last micro-batch
    least = (4 + 1) * (3 * 0.01 + 4 * one) + messages                            # each stage has a layer
    trials = ranks(4).run(time_emulated_steps, CONFIG, float64_train_flags(sizes, B, G), T, wire, 0.01, 2)
    assert all(len(each) == 2 for each in trials) and min(map(max, zip(*trials))) >= least


def test_a_message_counts_where_it_is_sent_and_the_tied_weight_apart():
    def row(op, axis, tag, payload):
        return CommRecord(op=op, axis_name=axis, tag=tag, payload_bytes=payload, axis_size=2,
                          sequence_number=1, start_time=0.0)
    rows = [row("send", "pp", "activations", 5), row("recv", "pp", "gradients", 7),
            row("all_reduce", "pp", "tied", 11), row("all_reduce", "data", "grads", 13),
            row("all_reduce", "tp", "layers", 17), row("all_reduce", "tp", "loss", 19)]
    assert payload_bytes_by_axis(rows) == {"tp": 36, "pp": 5, "dp": 13, "tied": 11}


def test_a_wrong_part_shows_by_its_norm_and_a_missing_one_is_infinite():
    want = {"a": torch.ones(4, 2), "b": torch.zeros(3)}
    a, b = ((TensorShard.of_whole_tensor(name, x.shape), x.clone()) for name, x in want.items())
    assert largest_gradient_error([{"a": a, "b": b}], want) == 0
    assert largest_gradient_error([{"a": (a[0], 1.5 * a[1]), "b": b}], want) == pytest.approx(0.5)
    assert largest_gradient_error([{"a": a}], want) == math.inf
    tiny = b[0], torch.full((3,), 1e-6)                                          # of a gradient that is zero
    assert largest_gradient_error([{"a": a, "b": tiny}], want) == pytest.approx(3 ** 0.5 / 8 ** 0.5)


def test_a_line_joins_neighbours_in_their_axis_s_colour_and_is_red_between_nodes(tmp_path):
    sizes = {"pp": 2, "dp": 1, "tp": 3}
    def place(rank):
        return {"pp": rank // 3, "dp": 0, "tp": rank % 3}
    picture = mesh_cubes({"one": (place, 3, {"tp": 4, "pp": 1})}, sizes, "mesh")
    lines = [line for line in picture.figure.axes[0].lines if line.get_marker() == "None"
             and len(line.get_xdata())]
    colours = [line.get_color() for line in lines]
    assert (colours.count(draw.BLUE), colours.count(draw.RED), colours.count(draw.GREEN)) == (4, 3, 0)
    widths = {line.get_color(): line.get_linewidth() for line in lines}
    assert widths == {draw.BLUE: 10.5, draw.RED: 3.75}
    assert all(line.is_dashed() == (line.get_color() == draw.RED) for line in lines)
    assert {text.get_text() for text in picture.figure.axes[0].texts} == {*"012345", "one"}
    assert picture.save(tmp_path / "mesh.png").stat().st_size > 5_000


def test_a_bar_ends_where_its_axes_add_up_and_the_line_is_where_it_was_predicted():
    rows = {"x": {"tp": 2.0, "dp": 1.0}, "y": {"pp": 4.0}}
    picture = stacked_axis_bars(rows, {"x": 3.5}, "bytes", "MB", "MB")
    axes = picture.figure.axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches if bar.get_width()]
    assert ends == [2.0, 3.0, 4.0]
    assert [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())] == [[3.5, 3.5]]
    assert [text.get_text().strip() for text in axes.texts] == ["3 MB", "4 MB"]


def test_gpt3_does_not_go_on_one_axis_alone():
    rows = {mesh: dict(zip(GPT3_COLUMNS, gpt3_on_mesh(*mesh))) for mesh in
            ((1, 1, 8, "tp"), (1, 1, 128), (128, 1, 1), (1, 1024, 1), (8, 16, 8, "tp"), (8, 16, 8, "pp"))}
    ends = [row["300 billion tokens"] for row in rows.values()]
    assert ends[0] == ends[3] == "out of memory" and ends[4:] == ["27 days", "44 days"]
    assert "try --tp 96" in ends[1] and "128 chunks cannot share 96 layers" in ends[2]
    assert gpt3_on_mesh(dp=1024, zero=3)[6:8] == ("83.7 s", "0.0 s")       # 3 m Psi, m = 2: lesson 08


def test_bloom_s_trials_stand_beside_the_formulas():
    grid = bloom_trials_table()
    rows = {row[0]: dict(zip(grid.columns, row)) for row in grid.rows}
    assert len(rows) == len(BLOOM_TRIALS)
    assert min(rows, key=lambda mesh: rows[mesh]["s a step"]) == "12 x 8 x 4"
    assert {mesh for mesh, row in rows.items() if row["s a step"] == "out of memory"} == {
        mesh for mesh, row in rows.items() if int(row["GB of states"]) > 60}
