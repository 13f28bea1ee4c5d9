from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nanoinfra.config import ModelConfig, config_for_size
from nanoinfra.formulas import inference_cost
from nanoinfra.formulas.model_states import kv_cache_bytes_per_token
from nanoinfra.formulas.parameters import parameter_count
from nanoinfra.lab.instruments.tensor_read_bytes import TensorReadBytes
from nanoinfra.model.attention_cores import naive_attention
from nanoinfra.model.decoder import Decoder

OPT = ModelConfig(50272, 5120, 40, 40, 40, 128, 20480, 2048, family="opt")


class Memory:
    """Some tokens of every layer, and plain products over them."""

    def __init__(self, config, batch, total, dtype):
        shape = config.layers, 2, batch, config.kv_heads, total, config.head_dim
        self.memory = torch.zeros(shape, dtype=dtype)

    def attend(self, layer, q, k, v, mask=None):
        return naive_attention(q, *self.memory[layer], mask)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), new=st.integers(1, 5), before=st.integers(0, 9),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_flops_and_bytes_are_what_the_operators_do(configs, data, batch, new, before, dtype):
    config, total = data.draw(configs), before + new
    with torch.device("meta"), torch.no_grad():
        model, cache = Decoder(config).to(dtype), Memory(config, batch, total, dtype)
        traffic = TensorReadBytes(weights=model.parameters(), cache=[cache.memory])
        with FlopCounterMode(display=False) as counter, traffic:
            tokens, places = torch.zeros(batch, new, dtype=torch.long), torch.arange(before, total)
            model.head(model.hidden_states(tokens, places, cache)[:, -1])
    assert counter.get_total_flops() == inference_cost.inference_flops(config, batch, new, total)
    assert traffic.read_bytes["weights"] == inference_cost.weight_bytes_read(config, dtype.itemsize)
    assert traffic.read_bytes["cache"] == inference_cost.kv_cache_bytes_read(config, batch, total,
                                                                             dtype.itemsize)


def test_weights_that_are_looked_up_are_not_read_whole():
    tied = config_for_size("nano")
    assert inference_cost.weight_bytes_read(tied, 4) == 4 * parameter_count(tied)
    untied, c = config_for_size("nano", tied=False), config_for_size("nano")
    assert inference_cost.weight_bytes_read(untied, 4) == inference_cost.weight_bytes_read(c, 4)
    assert inference_cost.weight_bytes_read(OPT, 2) == 2 * (parameter_count(OPT) - 2048 * 5120)   # positions


def test_the_ceiling_is_the_lower_of_the_two():
    c, B, S = config_for_size("nano"), 4, 100
    read, work = inference_cost.inference_bytes_read(c, B, S, 4), inference_cost.inference_flops(c, B, 1, S)
    assert inference_cost.max_tokens_per_second(c, B, 1, S, 4,
                                                bandwidth=read) == 4                      # a call a second
    assert inference_cost.max_tokens_per_second(c, B, 1, S, 4, peak_flops=2 * work) == 8
    assert inference_cost.max_tokens_per_second(c, B, 1, S, 4, read, 2 * work) == 4
    assert inference_cost.max_tokens_per_second(c, B, 1, S, 4, read, work / 2) == 2
    assert inference_cost.max_tokens_per_second(c, B, 1, S, 4) == inf


def test_batching_ends_where_caches_outgrow_the_weights():
    c, S = config_for_size("micro"), 512
    even = inference_cost.batch_size_where_cache_equals_weights(c, S, 2)
    assert even * S * kv_cache_bytes_per_token(c, 2) == pytest.approx(inference_cost.weight_bytes_read(c, 2))
    alone = inference_cost.max_tokens_per_second(c, 1, 1, S, 2, 1e9)
    most = 1e9 / (S * kv_cache_bytes_per_token(c, 2))
    at_even = inference_cost.max_tokens_per_second(c, even, 1, S, 2, 1e9)
    assert at_even == pytest.approx(most / 2)                                   # half the limit
    assert alone < inference_cost.max_tokens_per_second(c, 10**6, 1, S, 2, 1e9) < most


def test_intensity_is_two_flops_a_weight_and_token():
    """Pope et al. 2022: 2 FLOPs a parameter and token, over 2 bytes of bfloat16; the cache aside."""
    big = replace(OPT, kv_heads=1)
    assert inference_cost.arithmetic_intensity(big, 1, 1, 1, 2) == pytest.approx(1, rel=0.01)
    assert inference_cost.arithmetic_intensity(big, 64, 1, 1, 2) == pytest.approx(64, rel=0.01)


def test_an_answer_is_linear_with_the_cache_and_square_without():
    c = config_for_size("nano")
    cached = [inference_cost.generation_flops(c, 16, n) for n in (1, 129, 257)]
    again = [inference_cost.generation_flops(c, 16, n, use_cache=False) for n in (1, 128, 256)]
    assert cached[0] == again[0] == inference_cost.inference_flops(c, 1, 16, 16)
    assert cached[2] - cached[0] < 2.2 * (cached[1] - cached[0])
    assert again[2] > 3.5 * again[1]
    assert again[1] == sum(inference_cost.inference_flops(c, 1, n, n) for n in range(16, 144))
