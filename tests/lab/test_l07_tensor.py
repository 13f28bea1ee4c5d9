"""The checks of lesson 07 say which slip it was; what its pictures are drawn from is real."""
import math

import pytest

from lessons.l07_tensor_parallel.figures import (
    GPT2_SAVED_TENSORS,
    parameter_shard_map,
    run_tensor_parallel_step,
    saved_byte_bars,
    speed_over_tp_size,
    time_emulated_layers,
)
from nanoinfra.config import ModelConfig
from nanoinfra.formulas.collectives import ring_collective_seconds
from nanoinfra.formulas.parameters import parameter_shapes
from nanoinfra.formulas.saved_activations import layer_activation_bytes_by_term
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step, tp_shards
from nanoinfra.lab.mutants import collect_lesson_mutants

CONFIG = ModelConfig(61, 24, 2, 4, 4, 6, 40, 16, family="gpt2")
HINTS = {
    "cuts up along inputs": "a matrix is (outputs, inputs): cut along the other?",
    "keeps the bias of up whole": "whole? That is what does not fit",
    "deals out backwards": "rank 0: `up of 2 ranks` differs at [0, 0]",
    "deals out unit by unit": "dealt out one by one? A stretch is 6 neighbours",
    "divides the bias of down": "added to the sum, after g: every rank has it, whole",
    "f sums in place": "the gradient it was given is overwritten",
    "g sums in place": "the input it was given is overwritten",
    "f is g": "no sum here: f and g changed round?",
    "gives views": "a view keeps the whole matrix alive; .clone() the part",
    "never sums": "your part of the sum, and the bias: g is an all-reduce",
    "adds the bias on each rank": "down's bias from every rank? Add it once, to the sum",
    "adds the bias on one rank": "rank 1 of 2: `down_bias` has no gradient",
    "has no sum in backward": "`x.grad on 2 ranks` differs at [0, 0, 0]",
    "sums gradients twice": "2 x (42 of 42): does g sum in backward, too?",
    "sums the bias too": "bias/t inside g? Add the bias to the sum, after g",
    "lets the bias through f": "the bias went through f?",
    "applies f twice": "2 x (42 of 42): summed twice: f once, where up reads x",
    "reads by g and leaves by f": "f and g changed round? x enters by f, y leaves by g",
    "takes gelu after g": "GELU comes between the two matrices, not after g",
    "takes gelu by tanh": "GELU's approximation by tanh?",
    "averages": "divided by t? g is a sum, no mean",
    "calls all reduce itself": "autograd sees no gradient of all_reduce: let Leave call it",
    "reads twice": "one f for all that reads x, one g for y",
    "gathers hidden": "all_gather of 576 bytes, all_reduce of 336 bytes; want one all_reduce of 336",
    "pads hidden": "makes a tensor (2, 3, 15), 90 numbers, want at most 42",
    "takes its own maximum": "your own maximum? The sums need one in common",
    "keeps the targets logit": "one rank knows the target's logit: sum it over the ranks",
    "sums the exponentials themselves": "did ranks send different sizes?",
    "overwrites the targets": "`targets` is overwritten",
    "takes its own maximum off": "your own maximum taken off?",
    "counts column 0 of others": "column 0 of ranks that do not own the target counts, too? Times 0",
    "divides the columns evenly": "rank * (V // t)? Your columns begin at `start`",
    "takes the softmax of its own columns": "softmax over your own columns? Divide by the sum over all",
    "sums its own columns": "of your own columns alone: sum over the ranks",
    "misses the maximum": "`loss` is inf at [0] for logits near 800",
    "forgets to add the maximum": "less the maximum in one of the two only?",
    "takes 1 off in another column": "1 taken off in my first column for targets of other ranks",
    "sends row by row": "in 8 calls, want 144 in 3",
}
MUTANTS = {mutant.name: mutant for mutant in collect_lesson_mutants("07")}


@pytest.mark.parametrize("name", HINTS)
def test_a_slip_is_named(name):
    failure = MUTANTS[name].check.report(MUTANTS[name].variant).first_failure
    assert HINTS[name] in failure.text


@pytest.mark.parametrize("sp", ["none", "keep", "gather"])
def test_a_step_sends_and_keeps_what_the_formulas_say(ranks, sp):
    runs = ranks(2).run(run_tensor_parallel_step, CONFIG, 2, sp, 2, 8)
    (want, *_), = ranks(1).run(run_tensor_parallel_step, CONFIG, 1, "none", 2, 8)
    for loss, rows, kept in runs:
        assert loss == pytest.approx(want, rel=1e-5) and len(kept) == len(GPT2_SAVED_TENSORS)
        sent = tp_collectives_per_step(CONFIG, 2, 2, 8, sp=sp)
        got = {key: [row.payload_bytes for row in rows if (row.op, row.tag) == key] for key in sent}
        assert {key: (len(sizes), sum(sizes)) for key, sizes in got.items()} == sent
        assert sum(kept) == sum(layer_activation_bytes_by_term(CONFIG, 2, 8, 4, tp=2, sp=sp).values())


def test_layers_take_their_nap_and_wait_for_the_wire(ranks):
    wire = (1e-3, 1e6)
    least = CONFIG.layers * (0.06 / 2 + 4 * ring_collective_seconds("all_reduce", 2 * 8 * 24 * 4, 2, *wire))
    for trials in ranks(2).run(time_emulated_layers, CONFIG, 2, wire, 0.06, 2, 8, 2):
        assert len(trials) == 2 and min(trials) >= least


def test_each_number_of_a_matrix_is_drawn_once_and_what_everyone_has_is_grey():
    picture = parameter_shard_map([tp_shards(CONFIG, 2, rank) for rank in range(2)], parameter_shapes(CONFIG))
    parts = picture.figure.axes[0].patches
    sizes = [part.get_width() * part.get_height() for part in parts if part.get_width() > 3]
    matrices = ("embed", "attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    want = sum(shape[0] * shape[1] for name, shape in parameter_shapes(CONFIG).items()
               if name.startswith(("embed", "blocks.0")) and name.removesuffix(".weight").endswith(matrices))
    ends = CONFIG.vocab * CONFIG.width + 2 * CONFIG.context * CONFIG.width     # tied head; positions, by both
    assert sum(sizes) == want + ends and len(sizes) == 2 * (len(matrices) + 2)


def test_the_bias_of_a_row_parallel_matrix_is_drawn_after_g():
    picture = parameter_shard_map([tp_shards(CONFIG, 2, rank) for rank in range(2)], parameter_shapes(CONFIG))
    places = {(text.get_text(), text.get_position()[0]) for text in picture.figure.axes[0].texts}
    g, biases = (sorted(x for text, x in places if text == what) for what in ("g", "bias"))
    o, down = (next(x for text, x in places if text == what) for what in ("o", "down"))
    assert len(g) == 3 and o < g[1] < biases[0] < down < g[2] < biases[1]


def test_a_bar_ends_where_the_bytes_do_and_a_name_without_a_tensor_is_refused():
    rows = {"one": ([1000] * 15, 15000.0), "two": ([500] * 15, 7500.0)}
    picture = saved_byte_bars(rows, "kept")
    ends = [bar.get_x() + bar.get_width() for bar in picture.figure.axes[0].patches]
    assert max(ends[:3]) == 15.0 and max(ends[3:]) == 7.5
    with pytest.raises(ValueError, match="zip"):
        saved_byte_bars({"one": ([1000] * 14, 14000.0)}, "kept")


def test_the_cliff_is_drawn_over_the_ranks_of_a_node(tmp_path):
    picture = speed_over_tp_size({"here": (2, {1: 100.0, 2: 90.0, 4: 40.0}, "predicted", lambda t: 100 / t)},
                                 "speed")
    line, dots, _ = picture.figure.axes[0].lines
    assert list(dots.get_xdata()) == [0.5, 1, 2] and list(dots.get_ydata()) == [100, 90, 40]
    assert line.get_xdata()[[math.isnan(y) for y in line.get_ydata()].index(True) - 1] == 1    # the node ends
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0.5, 4.0)
    assert picture.save(tmp_path / "cliff.png").stat().st_size > 10_000
