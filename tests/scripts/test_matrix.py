"""The matrix of compositions: a few of its cells, and that a wrong gradient shows in them."""
import sys
from math import inf
from pathlib import Path

import pytest
import torch

from nanoinfra.formulas.parameters import TensorShard

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import matrix  # noqa: E402


def test_cells_are_within_the_tolerance_or_refused_with_the_reason():
    rows = matrix.measure([("1f1b", "recompute"), ("tp", "zb-h1"), ("ZeRO-2", "gpipe")])
    assert [row.get("ranks") for row in rows] == [2, 4, None]
    assert all(row["error"] < matrix.TOLERANCE for row in rows[:2]) and "use --zero 1" in rows[2]["refused"]
    assert rows[0]["bytes"].keys() == {"pp"} and rows[1]["bytes"].keys() == {"pp", "tp"}
    assert matrix.picture(rows).figure.axes[0].patches


def test_all_pairs_are_asked_for_and_no_technique_twice():
    configs = matrix.configurations(20)
    assert ("dp", "tp") in configs and ("dp", "ZeRO-1") not in configs and ("tp", "sp") not in configs
    assert ("gpipe", "1f1b") not in configs and sum(len(names) == 3 for names in configs) == 20
    assert {name for names in configs for name in names} == set(matrix.TECHNIQUES)


def test_a_wrong_or_missing_part_is_an_error():
    want = {"a": torch.ones(4, 2), "b": torch.ones(2)}
    whole = TensorShard.of_whole_tensor("a", (4, 2))
    top, bottom = ((whole.slice_dim(0, start, start + 2), torch.ones(2, 2)) for start in (0, 2))
    b = TensorShard.of_whole_tensor("b", (2,)), torch.ones(2)
    assert matrix.error([{"a": top, "b": b}, {"a": bottom}], want) == 0
    assert matrix.error([{"a": top, "b": b}, {}], want) == inf
    doubled = top[0], 2 * top[1]
    assert matrix.error([{"a": doubled, "b": b}, {"a": bottom}], want) == pytest.approx(0.5 ** 0.5)
