"""ZeRO's numbers: the paper's where the paper has them, and the shard map's exactly."""
import pytest

from nanoinfra.config import ModelConfig, sized
from nanoinfra.formulas.parameters import parameters
from nanoinfra.formulas.zero import padded, units, zero_buffers, zero_bytes, zero_calls, zero_payload

EVEN = ModelConfig(8192, 384, 6, 6, 6, 64, 1536, 256, tied=False, family="gpt2")
PSI = parameters(EVEN)


@pytest.mark.parametrize("stage, want", [(0, 16), (1, 4 + 12 / 64), (2, 2 + 14 / 64), (3, 14 / 64)])
def test_bytes_a_parameter_are_the_papers(stage, want):
    """Rajbhandari et al. 2020, figure 1; at stage 3 less 2 Psi/n: weights are cast from masters here."""
    held = sum(zero_bytes(EVEN, 64, stage, "bfloat16", grad_bytes=2).values())
    assert held == pytest.approx(want * PSI, rel=0.002)                    # padding: 64 ranks


def test_weights_in_float32_are_their_own_masters():
    held = zero_bytes(EVEN, 2, 3)
    assert held == dict.fromkeys(("weights", "gradients", "exp_avg", "exp_avg_sq"), 4 * PSI // 2)
    assert zero_bytes(EVEN, 2, 1)["weights"] == 4 * PSI


def test_payload_is_the_papers():
    for stage, a, want in ((1, 1, 2), (1, 4, 2), (2, 4, 5), (3, 4, 12)):
        assert sum(zero_payload(EVEN, 2, stage, a, "float32").values()) == 4 * want * PSI
    assert zero_payload(sized("test"), 2, 0, 3) == {"all_reduce": 4 * 54592}


def test_shards_are_filled_up_and_a_tied_head_travels_twice():
    assert [padded(shape, 4) for shape in ((5, 3), (1,), (), (8, 2))] == [24, 4, 4, 16]
    tied = zero_payload(sized("test"), 2, 3, 1)["reduce_scatter"]
    assert tied == 4 * (54592 + 32 + 258 * 32)                             # 257 rows: one of zeros, each use


def test_room_for_what_is_on_its_way():
    test = sized("test", tied=False)
    assert zero_buffers(test, 2, 1, "bfloat16", 4, 1000) == 2 * 4 * 258 * 32
    assert zero_buffers(test, 2, 2, "float64", 4, 1000) == 2 * 8 * 258 * 32
    assert zero_buffers(test, 2, 3, "bfloat16", 4, 1000) == 2 * 11584 * (2 + 4)
    assert zero_buffers(test, 2, 2, "float32", 4, 10**6) == 2 * 10**6


def test_calls_and_units():
    assert [len(unit) for unit in units(EVEN)] == [2, *[16] * 6, 3]
    buckets = 1 + 6 + 1                                # the head, six of about a block, the embedding
    assert zero_calls(EVEN, 2, 3, 2) == {"reduce_scatter": 2 * buckets, "all_gather": 2 * 2 * 8}
