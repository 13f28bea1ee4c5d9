from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nanoinfra.config import ModelConfig, sized
from nanoinfra.formulas.flops import forward_flops, mfu, train_flops
from nanoinfra.formulas.parameters import parameters, parameters_by_part, shapes
from nanoinfra.memory.recompute import apply
from nanoinfra.model.decoder import Decoder

CPU_KERNEL = {                              # the counter knows torch's fused attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
}
SMALL = [ModelConfig(61, 24, 3, 4, 2, 10, 40, 16, tied, family)
         for family in ("gpt2", "llama", "qwen3") for tied in (True, False)]


def name(config):
    return f"{config.family}-{'tied' if config.tied else 'untied'}"


def counted(model, batch, seq, kernels=None):
    """FLOPs that torch's counter sees in forward, and in backward."""
    tokens = torch.zeros(batch, seq, dtype=torch.long)
    with FlopCounterMode(display=False, custom_mapping=kernels) as forward:
        out = model(tokens)
    with FlopCounterMode(display=False, custom_mapping=kernels) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def gpt(width, layers, heads):
    return ModelConfig(51200, width, layers, heads, heads, width // heads, 4 * width, 2048, family="gpt2")


@settings(max_examples=25, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), seq=st.integers(1, 20))
def test_naive_is_what_the_counter_counts(configs, data, batch, seq):
    config = data.draw(configs)
    forward, backward = counted(Decoder(config, "naive"), batch, seq)
    assert forward == batch * seq * sum(forward_flops(config, seq).values())
    assert forward + backward == train_flops(config, batch, seq)


@pytest.mark.parametrize("config", SMALL, ids=name)
def test_sdpa_on_a_cpu_is_counted_without_attention(config):
    terms = forward_flops(config, 11)
    want = 2 * 11 * sum(terms[term] for term in ("qkvo", "mlp", "head"))
    assert counted(Decoder(config, "sdpa"), 2, 11) == (want, 2 * want)


@pytest.mark.parametrize("config", SMALL, ids=name)
def test_sdpa_computes_scores_again_in_backward(config):
    forward, backward = counted(Decoder(config, "sdpa"), 2, 11, CPU_KERNEL)
    terms = forward_flops(config, 11)
    assert forward == 2 * 11 * sum(terms.values())
    assert forward + backward == train_flops(config, 2, 11) + 2 * 11 * terms["scores"]
    assert terms["scores"] * 11 == 2 * config.layers * config.heads * config.head_dim * 11**2


@pytest.mark.parametrize("config", SMALL, ids=name)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_is_what_the_counter_counts(config, recompute):
    forward, backward = counted(apply(Decoder(config, "naive"), recompute), 2, 11)
    assert forward == train_flops(config, 2, 11) // 3
    assert forward + backward == train_flops(config, 2, 11, recompute=recompute)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_torch_stops_a_recompute_before_its_last_product(recompute):
    config = sized("test")
    got = sum(counted(recomputing(Decoder(config, "naive"), recompute), 2, 11))
    terms = forward_flops(config, 11)
    last = terms["values"] if recompute == "selective" else terms["mlp"] // 3
    assert got == train_flops(config, 2, 11, recompute=recompute) - 2 * 11 * last


def recomputing(model, recompute):
    """The decoder with every attention core, or every block, checkpointed."""
    for block in model.blocks:
        part, call = (block.attn, "core") if recompute == "selective" else (block, "forward")
        setattr(part, call, again(getattr(part, call)))
    return model


def again(fn):
    return lambda *args: checkpoint(fn, *args, use_reentrant=False)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seq=st.integers(1, 20))
def test_a_token_costs_6_parameters_and_12LHKT(configs, data, seq):
    config = data.draw(configs)
    matrices = sum(prod(shape) for name, shape in shapes(config).items()
                   if len(shape) == 2 and not name.startswith(("embed", "positions")))
    matrices += config.vocab * config.width if config.tied else 0
    square = 12 * config.layers * config.heads * config.head_dim * seq
    assert train_flops(config, 1, seq) == seq * (6 * matrices + square)
    assert train_flops(config, 1, seq, causal=True) == seq * (6 * matrices + square // 2)


@pytest.mark.parametrize("size", ["small", "medium", "large", "xl"])
@pytest.mark.parametrize("seq", [128, 1024])
def test_gpt2_is_the_published_form(size, seq):
    config = sized(size)
    B, T, C, L, V = 5, seq, config.width, config.layers, config.vocab
    head = 6 * B * T * C * V
    once = 72 * B * L * T * C * C                                # Korthikanti et al. 2022, equation 7
    assert train_flops(config, B, T) == once + once * T // (6 * C) + head
    assert train_flops(config, B, T, recompute="selective") == once + once * 2 * T // (9 * C) + head
    full = 96 * B * L * T * C * C                                # Narayanan et al. 2021, equation 3
    assert train_flops(config, B, T, recompute="full") == full + full * T // (6 * C) + head


def test_6_psi_t_is_near_when_width_is_large():
    gpt3, small = gpt(12288, 96, 96), sized("small")
    got = train_flops(gpt3, 1, 2048) / (6 * parameters(gpt3) * 2048)
    assert got == pytest.approx(1 + 2048 / (6 * 12288), abs=0.001)
    without_positions = parameters(small) - parameters_by_part(small)["positions"]
    assert train_flops(small, 1, 1024) / (6 * without_positions * 1024) == pytest.approx(1.15, abs=0.01)


@pytest.mark.parametrize("gpus, seconds, want", [(2240, 60.1, 126), (2800, 50.2, 121), (3360, 44.4, 113)])
def test_hardware_flops_of_mt_nlg_530b(gpus, seconds, want):
    """Smith et al. 2022: TFLOP/s a GPU, batch 1920, full recompute."""
    flops = train_flops(gpt(20480, 105, 128), 1920, 2048, recompute="full")
    assert flops / seconds / gpus / 1e12 == pytest.approx(want, abs=0.6)


@pytest.mark.parametrize("width, layers, heads, gpus, batch, seconds, want", [
    (6144, 48, 64, 8, 4, 1.10, 0.415), (12288, 96, 96, 64, 64, 13.75, 0.514),
    (20480, 105, 128, 280, 280, 37.83, 0.560), (25600, 128, 160, 512, 512, 71.49, 0.563)])
def test_mfu_is_that_of_korthikanti_2022(width, layers, heads, gpus, batch, seconds, want):
    got = mfu(batch * 2048 / seconds, gpt(width, layers, heads), 2048, gpus * 312e12)
    assert got == pytest.approx(want, abs=0.0025)                # printed times have three digits


def test_unknown_recompute_is_refused():
    with pytest.raises(ValueError, match="recompute 'half' is not one of none, selective, full"):
        train_flops(sized("test"), 1, 8, recompute="half")
