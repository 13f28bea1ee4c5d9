"""The sampler draws with the probabilities it says, from its own seed alone; penalties; log-probabilities."""
import math
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nanoinfra.serve.engine.request_and_output import Request, SamplingParams, check_request
from nanoinfra.serve.engine.sampler import LogitsProcessor, Sampler, gather_logprobs


def adjusted(logits, params, tokens, prompt):
    return LogitsProcessor(params)(logits, tokens, prompt)


def counts(n=4000, **how):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).log()       # of probabilities
    sampler = Sampler(SamplingParams(**how), seed=0)
    got = Counter(sampler.sample_next_token(logits) for _ in range(n))
    return [got[i] / n for i in range(5)]


@pytest.mark.parametrize("how, want", [
    ({}, [0.1, 0.4, 0.2, 0.3, 0]), ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30, 0]),        # squares
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]), ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3, 0]),
    ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7, 0]), ({"top_p": 0.05}, [0, 1, 0, 0, 0]),
    ({"min_p": 0.45}, [0, 4 / 9, 2 / 9, 3 / 9, 0]), ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
    ({"top_k": 3, "top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9, 0]),
    ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7, 0])])               # 4/9 + 3/9 >= 0.7, of the three
def test_sampling_has_the_probabilities_it_says(how, want):
    got = counts(**how)
    assert all(abs(g - w) < 0.035 for g, w in zip(got, want)), got
    assert all((g > 0) == (w > 0) for g, w in zip(got, want))


def drawn(seed, index, n=50):
    sampler, logits = Sampler(SamplingParams(), seed, index), torch.zeros(1000)
    return [sampler.sample_next_token(logits) for _ in range(n)]


def test_draws_follow_from_the_seed_and_the_index_alone():
    want = drawn(3, 0)
    torch.manual_seed(1)
    assert drawn(3, 0) == want
    assert drawn(3, 1) != want and drawn(4, 0) != want


@pytest.mark.parametrize("how, want", [
    ({"presence_penalty": 1.0}, [0.0, -1.0, 1.0, 2.0]), ({"frequency_penalty": 1.0}, [0.0, -2.0, 1.0, 2.0]),
    ({"presence_penalty": 0.5, "frequency_penalty": 0.25}, [0.0, -1.0, 1.25, 2.0]),
    ({"repetition_penalty": 2.0}, [0.0, 0.0, 1.0, 1.0]), ({"logit_bias": {0: 5.0, 3: -9.0}}, [5.0, 0.0, 2.0,
                                                                                              -7.0])])
def test_penalties_are_on_what_was_made_and_repetition_on_the_prompt_too(how, want):
    logits = torch.tensor([0.0, 0.0, 2.0, 2.0])
    got = adjusted(logits, SamplingParams(**how), tokens=[3, 1, 2, 1], prompt=1)
    assert got.tolist() == want and logits.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_a_penalty_lowers_what_is_positive_and_what_is_negative():
    got = adjusted(torch.tensor([4.0, -4.0]), SamplingParams(repetition_penalty=2.0), [0, 1], 2)
    assert got.tolist() == [2.0, -8.0]


def test_logprobs_are_the_models_and_the_likeliest_come_first():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]).log()
    first, second = gather_logprobs(logits, [2, 0], num_logprobs=2)
    assert first.token == 2 and first.logprob == pytest.approx(-1.6094, abs=1e-3)
    assert [token for token, _ in first.top_logprobs] == [1, 3]
    assert second.top_logprobs[0] == (0, pytest.approx(second.logprob))
    assert gather_logprobs(logits[:1], [2], num_logprobs=0)[0].top_logprobs == []
    assert gather_logprobs(logits, [], 5) == []


def sampled(logits, n=8, **how):
    sampler = Sampler(SamplingParams(**how), seed=0)
    return [sampler.sample_next_token(logits, [1, 2, 1], 1) for _ in range(n)]


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-9, 9.9e-6, -0.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_below_a_floor_it_is_greedy_to_the_bit(temperature, dtype):
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0 - 2 ** -7], dtype=dtype)
    assert set(sampled(logits, temperature=temperature)) == {1}
    assert Sampler(SamplingParams(temperature), 0).is_plain_argmax


def test_just_above_it_the_largest_still_wins_and_a_tie_is_drawn():
    assert set(sampled(torch.tensor([1.0, 2.0, 1.999]), 40, temperature=1e-5)) == {1}
    assert set(sampled(torch.tensor([3e38, 3e38, -3e38]), 40, temperature=1e-5)) == {0, 1}


DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
penalty = st.floats(-2, 2)
ways = st.builds(SamplingParams, temperature=st.floats(0, 100) | st.floats(0, 1e-4), top_k=st.integers(0, 5),
                 top_p=st.floats(1e-9, 1), min_p=st.floats(0, 1), presence_penalty=penalty,
                 frequency_penalty=penalty,
                 repetition_penalty=st.floats(1e-9, 100), seed=st.none() | st.integers(-2 ** 63, 2 ** 63 - 1),
                 logit_bias=st.dictionaries(st.integers(0, 4), st.floats(-100, 100)))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ways, st.sampled_from(DTYPES), st.lists(st.floats(-1, 1), min_size=5, max_size=5),
       st.integers(0, 2047), st.lists(st.integers(0, 4), max_size=6), st.integers(0, 3))
def test_what_is_asked_for_is_always_drawn(how, dtype, units, power, tokens, prompt):
    """With all values that `check` lets pass, of logits as large as the dtype has them."""
    check_request(Request("r", [0], how), context_length=99, vocab_size=5)
    most = torch.finfo(dtype).max
    logits = (torch.tensor(units, dtype=torch.float64) * min(2.0 ** (power / 2), most)).clamp(-most, most)
    sampler = Sampler(how, seed=0)
    for _ in range(3):
        assert 0 <= sampler.sample_next_token(logits.to(dtype), tokens, prompt) < 5
        tokens = [*tokens, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0, "logit_bias": {0: 1.0}}, {"top_k": 1},
                                 {"frequency_penalty": 1}])
def test_no_token_is_drawn_from_what_is_not_finite(how, value):
    with pytest.raises(ValueError, match=f"the largest logit is {value}: no token can be drawn"):
        sampled(torch.tensor([0.0, value, 1.0]), **how)
    with pytest.raises(ValueError, match="-inf"):
        sampled(torch.full((3,), -math.inf), **how)
    assert set(sampled(torch.tensor([-math.inf, 1.0, 1.0]), 40, **{"temperature": 100.0} | how)) <= {1, 2}


@pytest.mark.parametrize("how", [{"presence_penalty": 0.5, "frequency_penalty": -0.25},
                                 {"repetition_penalty": 1.7},
                                 {"repetition_penalty": 0.5, "presence_penalty": 1.0,
                                  "logit_bias": {2: 3.0, 4: -1.5}}])
def test_token_by_token_it_is_what_it_is_of_the_whole_text(how):
    sampler, how = Sampler(SamplingParams(**how), 0), SamplingParams(**how)
    draws = torch.Generator().manual_seed(0)
    tokens, logits = [3, 4, 1], torch.randn(6, generator=draws)
    for new in (2, 2, 4, 0, 2, 5, 5, 5):
        got = sampler.processor(logits, tokens, 3)
        torch.testing.assert_close(got, adjusted(logits, how, tokens, 3), rtol=0, atol=1e-6)
        tokens.append(new)


class Counting(TorchDispatchMode):
    """How many of torch's operations run, and how many numbers they make."""

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls += 1
        self.numbers += made.numel() if isinstance(made, torch.Tensor) else 0
        return made


@pytest.mark.parametrize("how", [{"logit_bias": {i: i % 7 - 3.0 for i in range(5000)}},
                                 {"repetition_penalty": 1.1},
                                 {"presence_penalty": 0.1, "frequency_penalty": 0.1}])
def test_what_a_token_costs_grows_neither_with_the_bias_nor_with_the_text(how):
    """Counted in operations and numbers: after 10 tokens as after 4,000. Continuations share the bias."""
    def work(sampler, tokens):
        with Counting() as seen:
            sampler.sample_next_token(logits, tokens, 2)
        return seen.calls, seen.numbers
    logits, first, twin = torch.zeros(5000), *(Sampler(SamplingParams(0.0, **how), 0, i) for i in range(2))
    twin.share_logit_bias(first)
    start, text = work(first, [1] * 10), list(range(4000))
    assert start[0] < 30
    sampler = Sampler(SamplingParams(0.0, **how), 0)
    sampler.sample_next_token(logits, text[:-2], 2)
    more = [work(sampler, text[:-1]), work(sampler, text)]
    assert more[0] == more[1] and more[0][0] <= 30 and more[0][1] < 40_000
    if how.get("logit_bias"):
        assert work(twin, [1] * 10)[0] < start[0] and twin.processor.bias is None
