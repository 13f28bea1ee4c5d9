import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoinfra.config import ModelConfig, RopeScaling
from nanoinfra.model.rope import dynamic_theta, rope_angles, rotate


def plain(head_dim, theta=10000.0):
    return ModelConfig(8, 8, 1, 1, 1, head_dim, 8, 64, theta=theta)


def test_rope_makes_scores_depend_on_distance_alone():
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 8, generator=draws, dtype=torch.float64) for _ in "qk")

    def score(t, s):
        at = (rope_angles(torch.tensor([p]), plain(8, 100.0), torch.float64) for p in (t, s))
        return (rotate(q, next(at)) * rotate(k, next(at))).sum(-1)

    torch.testing.assert_close(score(3, 1), score(40, 38))
    assert (score(3, 1) - score(3, 2)).abs().max() > 0.1


def test_rope_turns_pair_j_by_theta_to_minus_2j_over_k():
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 1] = 1.0                                              # the first half's j = 1
    got = rotate(x, rope_angles(torch.tensor([5]), plain(6, 100.0), torch.float64)).flatten().tolist()
    angle = 5 * 100.0 ** (-2 / 6)
    want = [0, math.cos(angle), 0, 0, math.sin(angle), 0]
    assert max(abs(g - w) for g, w in zip(got, want)) < 1e-15


def test_rope_takes_positions_of_each_sequence_and_wide_angles():
    own = torch.tensor([[0, 1, 2], [7, 8, 9]])
    cos, sin = rope_angles(own, plain(4), torch.bfloat16)
    assert cos.shape == sin.shape == (2, 1, 3, 2) and cos.dtype == torch.float32
    torch.testing.assert_close(cos[1], rope_angles(own[1], plain(4), torch.bfloat16)[0])


SCALED = {
    "linear": (RopeScaling("linear", 3.0), {}),
    "llama3": (RopeScaling("llama3", 8.0, 256, 1.5, 5.0), {"low_freq_factor": 1.5, "high_freq_factor": 5.0}),
    "yarn": (RopeScaling("yarn", 4.0, 256, beta_fast=20.0, beta_slow=2.0, attention_factor=1.25),
             {"beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.25}),
    "yarn, borders not whole": (RopeScaling("yarn", 4.0, 256, truncate=False, attention_factor=1.0),
                                {"truncate": False, "attention_factor": 1.0}),
    "dynamic": (RopeScaling("dynamic", 2.5, 64), {}),
}


@pytest.mark.parametrize("length", [64, 65, 500])
@pytest.mark.parametrize("scaling, said", SCALED.values(), ids=SCALED)
def test_scaled_frequencies_are_transformers_own(scaling, said, length):
    """At position 1 an angle is its frequency; before and beyond the original context of 64 tokens."""
    said |= {"rope_type": scaling.kind, "rope_theta": 5000.0, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        said["original_max_position_embeddings"] = 256
    config = LlamaConfig(hidden_size=48, num_attention_heads=2, max_position_embeddings=64,
                         rope_parameters=said)
    want, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu", length)
    assert len(want.unique()) == 12
    ours = replace(plain(24, 5000.0), rope_scaling=scaling)
    cos, sin = rope_angles(torch.arange(length), ours, torch.float32)
    torch.testing.assert_close(sin[0, 1], want.sin() * factor, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(cos[0, 1], want.cos() * factor, rtol=2e-6, atol=1e-9)


def test_stretched_frequencies_differ_from_plain_ones_where_they_should():
    def slowdown(scaling, length=256):
        configs = plain(16, 5000.0), replace(plain(16, 5000.0), rope_scaling=scaling)
        before, after = (rope_angles(torch.arange(length), each, torch.float64)[1][0, 1] for each in configs)
        return before / after                # of sines of small angles: (K/2,)
    for kind in ("yarn", "llama3"):
        slow = slowdown(RopeScaling(kind, 4.0, 256))
        assert slow[0] == 1 and slow[-1] == pytest.approx(4, rel=1e-6) and (slow.diff() >= -1e-12).all()
    assert slowdown(RopeScaling("factors", factors=(1, 1, 1, 2, 3, 4, 4, 4)))[3:6].tolist() == pytest.approx(
        [2, 3, 4], rel=1e-2)


def test_dynamic_theta_is_the_plain_one_up_to_the_original_context_and_grows_then():
    scaling = RopeScaling("dynamic", 2.0, 100)
    assert dynamic_theta(scaling, 500.0, 8, 100) == dynamic_theta(scaling, 500.0, 8, 3) == 500.0
    assert dynamic_theta(scaling, 500.0, 8, 200) == pytest.approx(500.0 * 3 ** (8 / 6))
    assert replace(plain(8), context=200, rope_scaling=scaling).cached_context == 100
