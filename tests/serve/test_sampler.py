"""The sampler draws with the probabilities it says, from its own seed alone; penalties; log-probabilities."""
from collections import Counter

import pytest
import torch

from nanoinfra.serve.requests import Sampling
from nanoinfra.serve.sampler import Sampler, adjusted, logprobs


def counts(n=4000, **how):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).log()       # of probabilities
    sampler = Sampler(Sampling(**how), seed=0)
    got = Counter(sampler.draw(logits) for _ in range(n))
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
    sampler, logits = Sampler(Sampling(), seed, index), torch.zeros(1000)
    return [sampler.draw(logits) for _ in range(n)]


def test_draws_follow_from_the_seed_and_the_index_alone():
    want = drawn(3, 0)
    torch.manual_seed(1)
    assert drawn(3, 0) == want
    assert drawn(3, 1) != want and drawn(4, 0) != want


@pytest.mark.parametrize("how, want", [
    ({"presence": 1.0}, [0.0, -1.0, 1.0, 2.0]), ({"frequency": 1.0}, [0.0, -2.0, 1.0, 2.0]),
    ({"presence": 0.5, "frequency": 0.25}, [0.0, -1.0, 1.25, 2.0]),
    ({"repetition": 2.0}, [0.0, 0.0, 1.0, 1.0]), ({"bias": {0: 5.0, 3: -9.0}}, [5.0, 0.0, 2.0, -7.0])])
def test_penalties_are_on_what_was_made_and_repetition_on_the_prompt_too(how, want):
    logits = torch.tensor([0.0, 0.0, 2.0, 2.0])
    got = adjusted(logits, Sampling(**how), tokens=[3, 1, 2, 1], prompt=1)
    assert got.tolist() == want and logits.tolist() == [0.0, 0.0, 2.0, 2.0]


def test_a_penalty_lowers_what_is_positive_and_what_is_negative():
    got = adjusted(torch.tensor([4.0, -4.0]), Sampling(repetition=2.0), [0, 1], 2)
    assert got.tolist() == [2.0, -8.0]


def test_logprobs_are_the_models_and_the_likeliest_come_first():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]).log()
    first, second = logprobs(logits, [2, 0], top=2)
    assert first.token == 2 and first.logprob == pytest.approx(-1.6094, abs=1e-3)
    assert [token for token, _ in first.top] == [1, 3] and second.top[0] == (0, pytest.approx(second.logprob))
    assert logprobs(logits[:1], [2], top=0)[0].top == [] and logprobs(logits, [], 5) == []
