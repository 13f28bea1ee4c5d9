"""Calls over a cache, counted, timed and drawn; the cache that a student's attend runs in."""
import pytest
import torch

from lessons.l15_kv_cache.exercise_cache import ExerciseKVCache
from lessons.l15_kv_cache.figures import (
    attention_mask_picture,
    count_flops_and_reads,
    measure_matmul_rate,
    measure_read_bandwidths,
    roofline,
    throughput_over_batch,
    time_tokens_per_second,
)
from nanoinfra.config import config_for_size
from nanoinfra.formulas import inference_cost
from nanoinfra.model.attention_cores import naive_attention
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights

NANO = config_for_size("test")


def attend(memory, length, q, k, v):
    end = length + k.shape[2]
    memory[0, :, :, length:end], memory[1, :, :, length:end] = k, v
    return naive_attention(q, *memory[:, :, :, :end])


@torch.no_grad()
def test_a_cache_is_filled_call_after_call_and_knows_nothing_before():
    model, tokens = init_weights(Decoder(NANO), seed=1).double(), torch.arange(18).view(2, 9)
    cache = ExerciseKVCache(attend, NANO, 2, 10, torch.float64)
    assert cache.memory.isnan().all()
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        got = model.hidden_states(tokens[:, begin:end], torch.arange(begin, end), cache)
        cache.length = end
    torch.testing.assert_close(got, model.hidden_states(tokens)[:, 5:], rtol=1e-10, atol=1e-10)
    assert not cache.memory[..., :9, :].isnan().any() and cache.memory[..., 9, :].isnan().all()


def test_counts_are_the_formulas():
    for B, T, S in ((1, 1, 9), (3, 4, 4), (2, 3, 8)):
        flops, read = count_flops_and_reads(NANO, attend, B, T, S)
        assert flops == inference_cost.inference_flops(NANO, B, T, S)
        assert read == {"weights": inference_cost.weight_bytes_read(NANO, 4),
                        "cache": inference_cost.kv_cache_bytes_read(NANO, B, S, 4)}


def test_a_rate_is_of_calls_of_that_shape():
    model, calls = init_weights(Decoder(NANO), seed=1), []

    def noted(memory, length, q, k, v):
        calls.append((length, tuple(q.shape)))
        return attend(memory, length, q, k, v)
    got = time_tokens_per_second(model, noted, B=2, T=3, S=8, repeats=4)
    assert (got.kind, got.unit, got.n) == ("timed", "tokens/s", 4) and got.value > 0
    assert calls == [(5, (2, 4, 3, 8))] * NANO.layers * 5                  # one call is not timed


def test_a_machine_has_a_bandwidth_and_a_peak():
    assert len(measure_read_bandwidths(2**22)) == 3 and min(measure_read_bandwidths(2**22).values()) > 0
    assert measure_matmul_rate(64) > 0


def test_pictures_show_each_call_and_each_key():
    picture = attention_mask_picture({"prefill": (3, 3), "decode": (1, 4)}, "who sees whom")
    bars = [bar for group in picture.figure.axes[0].containers for bar in group if bar.get_width()]
    assert len(bars) == 3 * 3 + 4
    assert [each.get_text() for each in picture.figure.axes[0].texts] == ["prefill\nT = 3, S = 3",
                                                                          "decode\nT = 1, S = 4"]


@pytest.mark.parametrize("draw", ["batches", "roof"])
def test_ceilings_are_named_as_such(draw, tmp_path):
    lines = {"MHA": ((1, 2), (3, 4)), "arithmetic": ((1, 2), (9, 9))}
    picture = throughput_over_batch(lines, {"MHA": ((1,), (2,))}, 1.5,
                                    "two ceilings") if draw == "batches" else roofline(
        {"decode": [(NANO, 1, 1, 8, 50.0), (NANO, 4, 1, 8, 90.0)]}, 4, 1e9, 1e10, "a roof")
    said = [text.get_text() for text in picture.figure.axes[0].get_legend().get_texts()]
    assert said == (["MHA: at most", "arithmetic: at most", "MHA, timed"] if draw == "batches"
                    else ["the roof: at most", "decode, timed"])
    assert picture.save(tmp_path / "x.png").stat().st_size > 10_000
