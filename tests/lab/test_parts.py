import pytest
import torch

from lessons.l02_ring_all_reduce.cases import chunk_label, count_labels, describe_labels


def chunk(parts, n):
    return torch.full((5,), sum(times * chunk_label(*part, n) for part, times in parts.items()),
                      dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_sum_is_taken_apart_again(n):
    every = {(rank, c): 1 for rank in range(n) for c in range(n)}
    assert count_labels(chunk(every, n), n) == every
    odd = {(0, n - 1): 3, (n - 1, 0): -2} if n > 1 else {(0, 0): -3}
    assert count_labels(chunk(odd, n), n) == odd
    assert count_labels(torch.zeros(5), n) == {}


@pytest.mark.parametrize("got", [
    torch.full((5,), 0.25), torch.full((5,), float("nan")), torch.full((5,), float("inf")),
    torch.tensor([1.0, 1, 1, 1, 2]), torch.full((5,), 4.0), torch.full((5,), 8.0**4)])
def test_what_is_no_such_sum_is_not_guessed_at(got):
    assert count_labels(got, 2) is None


@pytest.mark.parametrize("parts, want", [
    ({(0, 2): 1, (1, 2): 1, (3, 2): 1}, "holds the parts of ranks 0, 1, 3; rank 2's is missing"),
    ({(0, 2): 1}, "holds the part of rank 0; ranks 1, 2, 3's are missing"),
    ({(0, 2): 2, (1, 2): -1, (2, 2): 1, (3, 2): 1}, "holds the parts of ranks 0 (2 x), 1 (-1 x), 2, 3"),
    ({(0, 1): 1, (3, 1): 1}, "holds chunk 1 of ranks 0, 3"),
    ({(r, 2): 1 for r in range(4)} | {(1, 3): 1},
     "holds the parts of ranks 0, 1, 2, 3 and chunk 3 of rank 1"),
    ({}, "holds nothing, only zeros")])
def test_it_is_said_in_words(parts, want):
    assert describe_labels(parts, 2, 4) == want
