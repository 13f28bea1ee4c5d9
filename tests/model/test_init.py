import math
from dataclasses import replace

import pytest
import torch

from nanoinfra.config import sized
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.init import draw, init_weights


def test_a_draw_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    one = dict(init_weights(Decoder(sized("test")), seed=7).named_parameters())
    torch.manual_seed(2)
    other = Decoder(sized("test"))
    for name, parameter in reversed(list(other.named_parameters())):  # another order, another dtype
        want = draw(name, parameter.shape, 4, seed=7)
        assert torch.equal(one[name], want), name
    for name, got in init_weights(other.double(), seed=7).named_parameters():
        assert got.dtype == torch.float64 and torch.equal(got, one[name].double()), name


def test_other_seeds_and_other_names_give_other_weights():
    a, b, c = (draw(name, (64, 64), 4, seed) for name, seed in
               (("blocks.0.attn.q.weight", 0), ("blocks.1.attn.q.weight", 0), ("blocks.0.attn.q.weight", 1)))
    for x, y in ((a, b), (a, c), (b, c)):
        assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]) < 0.05


@pytest.mark.parametrize("name, std", [
    ("embed.weight", 0.02), ("blocks.3.attn.q.weight", 0.02), ("head.weight", 0.02),
    ("blocks.3.attn.o.weight", 0.02 / math.sqrt(24)), ("blocks.11.mlp.down.weight", 0.02 / math.sqrt(24))])
def test_spreads_are_gpt2s(name, std):
    x = draw(name, (300, 300), 12, seed=0)
    assert x.dtype == torch.float32
    assert abs(x.std().item() / std - 1) < 0.01 and abs(x.mean().item()) < 4 * std / 300


def test_norms_start_at_one_and_biases_at_zero():
    model = init_weights(Decoder(replace(sized("test"), family="gpt2")), seed=0)
    assert all((p == (1 if "norm" in name else 0)).all() if name.endswith("weight") else (p == 0).all()
               for name, p in model.named_parameters() if p.dim() == 1)


def test_the_drawing_never_changes():
    want = [-0.005319074262, 0.013639862649, 0.000495767861]                     # as first released
    got = draw("blocks.0.attn.q.weight", (4, 8), 2, seed=0)[0, :3]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=0)
