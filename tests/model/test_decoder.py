from dataclasses import replace

import pytest
import torch

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.model.attention_mask import CAUSAL_MASK, AttentionMask
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from tests.families import VARIANTS
from tests.model.twins import FAMILIES, tokens

NAMES = {
    "gpt2": "norm1.weight norm1.bias attn.q.weight attn.q.bias attn.k.weight attn.k.bias attn.v.weight "
            "attn.v.bias attn.o.weight attn.o.bias norm2.weight norm2.bias mlp.up.weight mlp.up.bias "
            "mlp.down.weight mlp.down.bias",
    "llama": "norm1.weight attn.q.weight attn.k.weight attn.v.weight attn.o.weight norm2.weight "
             "mlp.gate.weight mlp.up.weight mlp.down.weight",
    "qwen3": "norm1.weight attn.q.weight attn.k.weight attn.v.weight attn.o.weight attn.q_norm.weight "
             "attn.k_norm.weight norm2.weight mlp.gate.weight mlp.up.weight mlp.down.weight",
}
NAMES |= {"opt": NAMES["gpt2"], "bloom": NAMES["gpt2"]}


def config(family, tied=True):
    """A small decoder of the family, or of one of VARIANTS."""
    if family in VARIANTS:
        return replace(config("llama", tied), **{"family": family, **VARIANTS[family]})
    layered = family in ("gpt2", "opt", "bloom")                 # C = H K, as many KV heads
    return ModelConfig(vocab=97, width=30, layers=2, heads=6, kv_heads=6 if layered else 2,
                       head_dim=5 if layered else 8, hidden=120 if family == "bloom" else 50, context=40,
                       tied=tied, family=family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_the_agreed_names(family, tied):
    model = Decoder(config(family, tied))
    want = ["embed.weight"] + ["positions.weight"] * (family in ("gpt2", "opt"))
    want += ["embed_norm.weight", "embed_norm.bias"] * (family == "bloom")
    want += [f"blocks.{i}.{name}" for i in range(2) for name in NAMES[family].split()]
    want += ["norm.weight"] + ["norm.bias"] * (model.config.architecture.norm_type == "layer")
    want += ["head.weight"] * (not tied)
    assert [name for name, _ in model.named_parameters()] == want
    assert (model.head.weight is model.embed.weight) == tied
    assert not list(model.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_naive_and_sdpa_are_one_model_and_float64_stays_float64(family):
    x = tokens(97)
    want, got = (init_weights(Decoder(config(family), core), 3).double()(x) for core in ("naive", "sdpa"))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_given_are_the_positions_used(family):
    model, x = init_weights(Decoder(config(family)), seed=3).double(), tokens(97, (2, 9))
    want = model(x)
    torch.testing.assert_close(model(x, torch.arange(9).expand(2, 9)), want, rtol=1e-12, atol=1e-14)
    shifted = model(x, torch.arange(9) + 20)
    if model.config.architecture.position_encoding == "learned":
        assert (shifted - want).abs().max() > 1e-3
    elif family == "bloom":                                      # ALiBi takes none
        assert torch.equal(shifted, want)
    else:                                                        # RoPE sees distances alone
        torch.testing.assert_close(shifted, want, rtol=1e-9, atol=1e-12)
        assert (model(x, torch.arange(9) * 3) - want).abs().max() > 1e-6


def test_cores_and_caches_are_seen_by_every_layer():
    class Cache:
        seen = []

        def attend(self, layer, q, k, v, mask):
            self.seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
            assert mask == CAUSAL_MASK
            return torch.zeros_like(q)

    Decoder(config("llama"))(tokens(97, (2, 5)), cache=Cache())
    assert Cache.seen == [(layer, (2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)) for layer in (0, 1)]


def test_embed_norm_norms_what_the_embedding_gives():
    model, x = init_weights(Decoder(config("bloom")), seed=3), tokens(97, (2, 5))
    want = torch.nn.functional.layer_norm(model.embed(x), (30,), eps=1e-5)
    got = model.embed_tokens(x, model.default_positions(x))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert model.rope_cos_sin(model.default_positions(x),
                              x.dtype) is None and Decoder(config("gpt2")).embed_norm is None


def test_slopes_are_numbers_that_a_rank_can_slice():
    """Heads 3..5 of a model cut by heads: its o gives what they add to the whole's."""
    attn = init_weights(Decoder(config("bloom")), seed=3).double().blocks[0].attn
    x = torch.randn(2, 9, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want, halves = attn(x), []
    for rows in (slice(0, 15), slice(15, 30)):
        half = init_weights(Decoder(config("bloom")), seed=3).double().blocks[0].attn
        for linear in (half.q, half.k, half.v):
            linear.weight.data, linear.bias.data = linear.weight.data[rows], linear.bias.data[rows]
        half.o.weight.data = half.o.weight.data[:, rows]
        half.mask = AttentionMask(alibi_slopes=half.mask.alibi_slopes[rows.start // 5:rows.stop // 5])
        halves.append(half(x))
    torch.testing.assert_close(sum(halves) - attn.o.bias, want, rtol=1e-10, atol=1e-12)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="41 tokens do not fit the model's context of 40; give at most 40"):
        Decoder(config("llama"))(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(ValueError, match="head_dim 7 is odd.*try 8"):
        Decoder(ModelConfig(8, 14, 1, 2, 2, 7, 6, 8))


def test_every_named_size_builds():
    for name in ("test", "nano", "small", "xl"):
        with torch.device("meta"):
            assert Decoder(config_for_size(name)).config.context >= 64
