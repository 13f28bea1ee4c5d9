import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.config import ModelConfig, sized
from nanoinfra.formulas.parameters import PARTS, parameters, parameters_by_part, part_of, shapes
from nanoinfra.model.decoder import Decoder

LLAMA_7B = ModelConfig(32000, 4096, 32, 32, 32, 128, 11008, 2048, tied=False)
SMOLLM2_135M = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192)
BLOOM_176B = ModelConfig(250880, 14336, 70, 112, 112, 128, 57344, 2048, family="bloom")
OPT_125M = ModelConfig(50272, 768, 12, 12, 12, 64, 3072, 2050, family="opt")    # two positions of no token
QWEN3_06B = ModelConfig(151936, 1024, 28, 16, 8, 128, 3072, 40960, family="qwen3")


def gpt(width, layers, heads):
    """Narayanan et al. 2021, table 1: their vocabulary and sequence length."""
    return ModelConfig(51200, width, layers, heads, heads, width // heads, 4 * width, 2048, family="gpt2")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shapes_are_the_models_in_its_order(configs, data):
    config = data.draw(configs)
    want = [(name, tuple(p.shape)) for name, p in Decoder(config).named_parameters()]
    got = list(shapes(config).items())
    assert got == want


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_count_is_the_models(configs, data):
    config = data.draw(configs)
    model = Decoder(config)
    parts = parameters_by_part(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    assert tuple(parts) == PARTS
    assert parts["attention"] == sum(p.numel() for b in model.blocks for n, p in b.attn.named_parameters()
                                     if "norm" not in n)
    assert parts["mlp"] == sum(p.numel() for b in model.blocks for p in b.mlp.parameters())
    assert parts["embedding"] == config.vocab * config.width
    assert parts["head"] == (0 if config.tied else parts["embedding"])


@pytest.mark.parametrize("config, want", [
    (sized("small"), 124_439_808),
    (sized("xl"), 1_557_611_200),
    (SMOLLM2_135M, 134_515_008),
    (LLAMA_7B, 6_738_415_616),
    (QWEN3_06B, 596_049_920),
    (BLOOM_176B, 176_247_271_424),
    (OPT_125M, 125_239_296),
], ids=["gpt2", "gpt2-xl", "smollm2-135m", "llama-7b", "qwen3-0.6b", "bloom-176b", "opt-125m"])
def test_count_is_the_published_one(config, want):
    assert parameters(config) == want


@pytest.mark.parametrize("width, layers, heads, billions", [
    (2304, 24, 24, 1.7), (4096, 36, 32, 7.5), (12288, 80, 96, 145.6), (20480, 105, 128, 529.6),
    (25600, 128, 160, 1008.0)])
def test_gpt_is_equation_2_of_narayanan_2021(width, layers, heads, billions):
    C, L, V, T = width, layers, 51200, 2048
    got = parameters(gpt(width, layers, heads))
    assert got == 12 * L * C * C + 13 * L * C + (V + T) * C + 2 * C         # + the final norm
    assert got / 1e9 == pytest.approx(billions, abs=0.051)


def test_untying_adds_a_head():
    tied, untied = sized("test"), sized("test", tied=False)
    assert parameters(untied) - parameters(tied) == 257 * 32
    assert list(shapes(untied).items())[-1] == ("head.weight", (257, 32))


@pytest.mark.parametrize("name, want", [
    ("embed.weight", "embedding"), ("positions.weight", "positions"), ("blocks.3.attn.k.bias", "attention"),
    ("blocks.3.attn.k_norm.weight", "norms"), ("blocks.0.norm1.bias", "norms"), ("norm.weight", "norms"),
    ("blocks.0.mlp.gate.weight", "mlp"), ("head.weight", "head")])
def test_part_of_a_name(name, want):
    assert part_of(name) == want


def test_part_of_an_unknown_name():
    with pytest.raises(ValueError, match="no decoder has a parameter named 'wte.weight'"):
        part_of("wte.weight")
