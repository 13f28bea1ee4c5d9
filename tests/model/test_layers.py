import math

import torch
from torch.nn import functional as F

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model.layers import MLP, RMSNorm, rope_angles, rotate


def test_rms_norm_is_torchs_own_in_float64_and_sums_in_float32_for_bfloat16():
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = RMSNorm(24, eps=1e-3).double()
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-3), rtol=1e-14, atol=0)
    many = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)      # a bf16 sum of nines stops growing early
    assert RMSNorm(4096, eps=0.0).bfloat16()(many)[0, 0] == 1.0


def test_rope_makes_scores_depend_on_distance_alone():
    draws = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 1, 8, generator=draws, dtype=torch.float64) for _ in "qk")

    def score(t, s):
        at = (rope_angles(torch.tensor([p]), 8, 100.0, torch.float64) for p in (t, s))
        return (rotate(q, next(at)) * rotate(k, next(at))).sum(-1)

    torch.testing.assert_close(score(3, 1), score(40, 38))
    assert (score(3, 1) - score(3, 2)).abs().max() > 0.1


def test_rope_turns_pair_j_by_theta_to_minus_2j_over_k():
    x = torch.zeros(1, 1, 1, 6, dtype=torch.float64)
    x[..., 1] = 1.0                                              # the first half's j = 1
    got = rotate(x, rope_angles(torch.tensor([5]), 6, 100.0, torch.float64)).flatten().tolist()
    angle = 5 * 100.0 ** (-2 / 6)
    want = [0, math.cos(angle), 0, 0, math.sin(angle), 0]
    assert max(abs(g - w) for g, w in zip(got, want)) < 1e-15


def test_rope_takes_positions_of_each_sequence_and_wide_angles():
    own = torch.tensor([[0, 1, 2], [7, 8, 9]])
    cos, sin = rope_angles(own, 4, 10000.0, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 1, 3, 2) and cos.dtype == torch.float32
    torch.testing.assert_close(cos[1], rope_angles(own[1], 4, 10000.0, torch.bfloat16)[0])


def test_mlp_has_a_gate_and_biases_where_the_family_has():
    shape = (8, 4, 1, 1, 1, 4, 6, 8, True)
    names = [name for name, _ in MLP(ModelConfig(*shape, family="llama")).named_parameters()]
    assert names == ["gate.weight", "up.weight", "down.weight"]
    gelu = MLP(ModelConfig(*shape, family="gpt2"))
    assert [n for n, _ in gelu.named_parameters()] == ["up.weight", "up.bias", "down.weight", "down.bias"]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    inner = F.linear(x, gelu.up.weight, gelu.up.bias)
    tanh = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    torch.testing.assert_close(gelu(x), F.linear(tanh, gelu.down.weight, gelu.down.bias))
