"""Bytes by axis: limits that can be seen, and sums over a mesh that cannot depend on it."""
from dataclasses import replace

import pytest

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas.communication_by_axis import rank_parameter_counts, step_bytes_by_axis
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.formulas.tensor_parallel import tp_collectives_per_step
from tests.families import KINDS

CONFIG = ModelConfig(vocab=61, width=16, layers=6, heads=4, kv_heads=2, head_dim=4, hidden=24, context=8)


def total(config, p, d, t, m):
    """{axis: bytes} of all ranks, micro-batches of 2 x 8 tokens in float64."""
    ranks = [step_bytes_by_axis(config, p, d, t, 2, 8, m, 8, stage,
                                rank) for stage in range(p) for rank in range(t)]
    return {axis: d * sum(each[axis] for each in ranks) for axis in ranks[0]}


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_stages_and_tensor_ranks_hold_the_model_once_but_for_what_everyone_has(family, tied):
    config = replace(CONFIG, family=family, tied=tied, kv_heads=4)
    psi, again = parameter_count(config), config.vocab * config.width * tied
    for p in (1, 2, 3):
        stages = [rank_parameter_counts(config, p, 1, stage) for stage in range(p)]
        assert sum(sum(numbers.values()) for numbers in stages) == psi + again * (p > 1)
    whole, (a, b) = rank_parameter_counts(config, 1, 1), (rank_parameter_counts(config, 1, 2,
                                                                                rank=rank) for rank in (0, 1))
    assert sum(a.values()) + sum(b.values()) == psi + sum(n for name, n in whole.items() if a[name] == n)


def test_a_mesh_of_one_sends_nothing_and_the_axes_do_not_see_each_other():
    assert set(total(CONFIG, 1, 1, 1, 4).values()) == {0}
    tp = [total(CONFIG, *mesh)["tp"] for mesh in ((1, 1, 2, 4), (2, 1, 2, 4), (3, 2, 2, 2))]
    assert tp[0] == tp[1] == tp[2] > 0
    assert total(CONFIG, 2, 2, 2, 2)["pp"] == 2 * total(CONFIG, 2, 1, 1, 4)["pp"]        # t send the same
    assert total(CONFIG, 2, 2, 1, 2)["dp"] == 2 * 8 * (parameter_count(CONFIG) + 61 * 16)


@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tp_is_what_tensor_parallelism_alone_sends(t, family, recompute):
    config = replace(CONFIG, family=family)
    want = sum(size for _, size in tp_collectives_per_step(config, t, 2, 8, 3, 8, 8,
                                                           recompute=recompute).values())
    assert step_bytes_by_axis(config, 1, 1, t, 2, 8, 3, 8, recompute=recompute)["tp"] == want


def test_gpt3_in_the_megatron_paper_s_mesh():
    """12 layers a stage with 4 all-reduces of b s h numbers each; messages of b s h; Psi/64 gradients."""
    gpt3 = replace(config_for_size("xl"), vocab=51200, width=12288, layers=96, heads=96, kv_heads=96,
                   head_dim=128,
                   hidden=4 * 12288, context=2048)
    stream = 2 * 2048 * 12288
    got = step_bytes_by_axis(gpt3, 8, 16, 8, 1, 2048, 96, 2, stage=4)
    assert got["tp"] == 96 * 4 * 12 * stream and got["pp"] == 2 * 96 * stream and got["tied"] == 0
    assert got["dp"] == pytest.approx(2 * parameter_count(gpt3) / 64, rel=0.01)


def test_what_cannot_be_cut_so_is_refused():
    with pytest.raises(ValueError, match="tp=3 cannot share"):
        step_bytes_by_axis(CONFIG, 1, 1, 3, 2, 8, 1, 8)
    with pytest.raises(ValueError, match="7 chunks cannot share 6 layers"):
        step_bytes_by_axis(CONFIG, 7, 1, 1, 2, 8, 1, 8)
