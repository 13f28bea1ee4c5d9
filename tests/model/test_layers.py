import math

import pytest
import torch
from torch.nn import functional as F

from nanoinfra.config import ModelConfig
from nanoinfra.model.layers import MLP, RMSNorm


def test_rms_norm_is_torchs_own_in_float64_and_sums_in_float32_for_bfloat16():
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = RMSNorm(24, eps=1e-3).double()
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (24,), norm.weight, 1e-3), rtol=1e-14, atol=0)
    many = torch.full((1, 4096), 3.0, dtype=torch.bfloat16)      # a bf16 sum of nines stops growing early
    assert RMSNorm(4096, eps=0.0).bfloat16()(many)[0, 0] == 1.0


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


@pytest.mark.parametrize("name, theirs", [("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)])
def test_an_activation_is_the_configurations_behind_a_gate_and_without(name, theirs):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for family in ("gpt2", "llama"):
        mlp = MLP(ModelConfig(8, 4, 1, 1, 1, 4, 6, 8, family=family, activation=name))
        hidden = theirs(mlp.gate(x)) * mlp.up(x) if mlp.gate else theirs(mlp.up(x))
        torch.testing.assert_close(mlp(x), mlp.down(hidden))
