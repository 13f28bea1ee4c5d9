"""Stages' layers, and the forms of the papers where they hold."""
from itertools import combinations_with_replacement

import pytest

from nanoinfra.config import SIZES, ModelConfig, sized
from nanoinfra.formulas.pipeline import bubble, chunk_flops, idle, in_flight, message_bytes, sent_bytes, split


@pytest.mark.parametrize("name, n", [("test", 3), ("nano", 2), ("nano", 4), ("micro", 5), ("small", 4)])
def test_no_other_split_has_a_cheaper_costliest_chunk(name, n):
    config = SIZES[name].model
    got, seq = split(config, n, 128), 128
    assert got[0][0] == 0 and got[-1][1] == config.layers and len(got) == n
    assert all(a[1] == b[0] for a, b in zip(got, got[1:]))
    costs = chunk_flops(config, n, seq)
    layer, others = costs[0] / (got[0][1] - got[0][0]), []
    head = costs[-1] - layer * (got[-1][1] - got[-1][0])
    for cut in combinations_with_replacement(range(config.layers + 1), n - 1):
        ends = [0, *cut, config.layers]
        sizes = [b - a for a, b in zip(ends, ends[1:])]
        if min(sizes[:-1]) > 0:
            others.append(max([s * layer for s in sizes[:-1]] + [sizes[-1] * layer + head]))
    assert max(costs) == pytest.approx(min(others)) and split(config, 1, seq) == [(0, config.layers)]


def test_more_chunks_than_layers_are_refused():
    with pytest.raises(ValueError, match="8 chunks cannot share 4 layers; pp x virtual is at most 4"):
        split(sized("test"), 8, 64)


def test_a_head_that_costs_more_than_the_layers_stands_alone():
    config = ModelConfig(5000, 32, 6, 4, 4, 8, 64, 64)
    assert split(config, 3, 64) == [(0, 3), (3, 6), (6, 6)]


def test_idle_forms():
    assert idle("gpipe", 4, 8, 1, 1, 1) == idle("1f1b", 4, 8, 1, 1, 1) == 9
    assert idle("interleaved", 4, 8, 1, 1, 1, v=3) == 3
    assert idle("zb-h1", 4, 8, 1, 1, 1) == 3                    # (p-1)(F+B-W), as Qi et al. print it
    assert idle("zb-h1", 4, 8, 2, 3, 5) == 9                    # where W is longer, B or F bounds it
    assert idle("zb-h1", 4, 2, 1, 1, 1) == 5
    assert bubble(4, 8) == pytest.approx(9 / (8 * 3 + 9)) and bubble(4, 8, 2) == pytest.approx(3 / 19)
    with pytest.raises(ValueError, match="give at least 4 micro-batches"):
        idle("zb-h1", 4, 2, 1, 1, 2)
    with pytest.raises(ValueError, match="no schedule is called 'bfs'"):
        idle("bfs", 4, 2, 1, 1, 2)


def test_in_flight_and_bytes():
    assert [in_flight("1f1b", 4, r, 8) for r in range(4)] == [4, 3, 2, 1]
    assert in_flight("gpipe", 4, 3, 8) == 8 and in_flight("zb-h1", 4, 3, 8) == 4
    assert in_flight("interleaved", 4, 0, 8, 2) == 4 * 2 + 4 - 1                # p v + p - 1
    config = sized("test")
    assert message_bytes(config, 2, 9, 8) == 2 * 9 * 32 * 8
    each = message_bytes(config, 2, 9, 8)
    assert sent_bytes(config, 3, 5, 2, 9, 8) == [5 * each, 10 * each, 5 * each]
    assert sent_bytes(config, 2, 4, 2, 9, 8, v=2) == [12 * each, 12 * each]
    assert sent_bytes(config, 1, 4, 2, 9, 8) == [0]
