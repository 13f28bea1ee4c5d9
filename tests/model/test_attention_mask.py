"""Masks as tensors, as kinds and cut by document, each against the predicate of tests/model/seen.py."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.model.attention_mask import (
    CAUSAL_MASK,
    AttentionMask,
    additive_mask,
    every_query_sees_itself,
    hidden_key_mask,
    mask_kind,
    query_and_key_positions,
    seen_key_span,
    split_by_document,
)
from tests.model.seen import MASKS, SLOPES, seen_keys, sees

CPU = torch.device("cpu")
ENDS = st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True).map(lambda ends: tuple(sorted(ends)))
ANY = st.builds(AttentionMask, window=st.none() | st.integers(1, 9), causal=st.booleans(),
                first_positions=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9)),
                document_ends=st.none() | ENDS)


def seen_pairs(mask, T, S):
    return {(t, s) for t, keys in enumerate(seen_keys(mask, T, S)[0]) for s in keys}


@settings(max_examples=400, deadline=None)
@given(mask=ANY, T=st.integers(1, 7), S=st.integers(0, 7))
def test_the_tensor_the_kind_and_the_cut_say_what_is_seen(mask, T, S):
    want = seen_pairs(mask, T, S)
    hidden = hidden_key_mask(mask, T, S, CPU)
    assert hidden.shape == (T, S) and hidden.dtype == torch.bool
    assert {(t, s) for t in range(T) for s in range(S) if not hidden[t, s]} == want
    everything = {(t, s) for t in range(T) for s in range(S)}
    diagonal = {(t, s) for t in range(T) for s in range(t + 1)}
    kinds = {"none": not want, "all": bool(want) and want == everything,
             "diagonal": bool(want) and T == S > 1 and want == diagonal}
    kind = mask_kind(mask, T, S)
    if kind == "mixed":                      # a diagonal by accident of a window ahead need not be known
        assert not kinds["none"] and not kinds["all"] and not (kinds["diagonal"] and mask.causal)
    else:
        assert kinds[kind]
    rows, found = [], set()
    for queries, keys, part in split_by_document(mask, T, S):
        rows += range(T)[queries]
        assert part.document_ends is None
        pairs = seen_pairs(part, len(range(T)[queries]), len(range(S)[keys]))
        found |= {(queries.start + t, keys.start + s) for t, s in pairs}
    assert rows == list(range(T)) and found == want


@settings(max_examples=200, deadline=None)
@given(mask=ANY, position=st.integers(0, 20))
def test_a_query_sees_one_span_of_keys(mask, position):
    first, end = seen_key_span(mask, position)
    for key in range(-5, 40):
        assert (first <= key < end) == sees(mask, position, key)


@pytest.mark.parametrize("mask, T, S, want", [
    (CAUSAL_MASK, 256, 256, "diagonal"), (CAUSAL_MASK, 1, 256, "all"), (CAUSAL_MASK, 3, 256, "mixed"),
    (AttentionMask(window=256), 256, 256, "diagonal"), (AttentionMask(window=255), 256, 256, "mixed"),
    (AttentionMask(alibi_slopes=SLOPES), 9, 9, "diagonal"), (AttentionMask(causal=False), 9, 4, "all"),
    (AttentionMask(first_positions=(8, 4)), 4, 4, "all"), (AttentionMask(first_positions=(4, 4)), 4, 4,
                                                           "diagonal"),
    (AttentionMask(first_positions=(4, 8)), 4, 4, "none"), (AttentionMask(first_positions=(4, 7)), 4, 4,
                                                            "mixed"),
    (AttentionMask(document_ends=(4, 8)), 8, 8, "mixed"), (AttentionMask(document_ends=(8,)), 8, 8,
                                                           "diagonal"),
    (AttentionMask(first_positions=(4, 0), document_ends=(4, 8)), 4, 4, "none")])
def test_kinds_by_name(mask, T, S, want):
    assert mask_kind(mask, T, S) == want


def test_positions_are_the_last_keys_or_those_given():
    assert query_and_key_positions(CAUSAL_MASK, 3, 8) == (range(5, 8), range(8))
    assert query_and_key_positions(AttentionMask(first_positions=(0, 4)), 3, 2) == (range(3), range(4, 6))
    assert every_query_sees_itself(CAUSAL_MASK, 3, 8)
    assert not every_query_sees_itself(AttentionMask(first_positions=(4, 0)), 3, 6)
    assert not every_query_sees_itself(AttentionMask(first_positions=(0, 1)), 3, 6)


@pytest.mark.parametrize("name", MASKS)
def test_what_is_added_is_minus_slope_times_distance_or_minus_infinity(name):
    mask, T, S = MASKS[name]
    got = additive_mask(mask, T, S, torch.float64, CPU)
    seen, distances = seen_keys(mask, T, S)
    assert got.shape == ((T, S) if mask.alibi_slopes is None else (1, 6, T, S)) and got.dtype == torch.float64
    slopes = mask.alibi_slopes or (0.0,)
    want = torch.tensor([[[-slope * distances[t][s] if s in seen[t] else -math.inf for s in range(S)]
                          for t in range(T)] for slope in slopes], dtype=torch.float64)
    torch.testing.assert_close(got.view_as(want), want, rtol=1e-15, atol=0)


def test_small_tensors_are_made_once_and_large_ones_are_not_kept():
    mask = AttentionMask(window=5)
    first, large = (additive_mask(mask, n, n, torch.float32, CPU) for n in (512, 513))
    assert additive_mask(mask, 512, 512, torch.float32, CPU) is first
    assert additive_mask(mask, 513, 513, torch.float32, CPU) is not large
    assert additive_mask(mask, 512, 512, torch.float64, CPU).dtype == torch.float64
    slopes = mask._replace(alibi_slopes=SLOPES)
    assert additive_mask(slopes, 256, 256, torch.float32, CPU) is not additive_mask(slopes, 256, 256,
                                                                                    torch.float32, CPU)
    with torch.inference_mode():
        assert not additive_mask(AttentionMask(window=6), 8, 8, torch.float32, CPU).is_inference()
