import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoinfra.train.loss_scale import LARGEST, LossScale


def values(scale, overflows):
    seen = []
    for overflow in overflows:
        scale.update(overflow)
        seen.append(scale.value)
    return seen


def test_it_halves_on_overflow_and_doubles_after_good_steps_in_a_row():
    got = values(LossScale(8, grow_after=3), [False, False, True, False, False, False, False, True, True])
    assert got == [8, 8, 4, 4, 4, 8, 8, 4, 2]


def test_an_overflow_starts_the_count_again():
    assert values(LossScale(8, grow_after=2), [False, True, False, True, False, False]) == [8, 4, 4, 2, 2, 4]


def test_the_usual_scale():
    scale = LossScale()
    assert scale.value == 65536
    assert values(scale, [False] * 1999)[-1] == 65536 and values(scale, [False]) == [131072]


def test_it_stops_growing_at_the_largest():
    assert values(LossScale(LARGEST / 2, grow_after=1), [False] * 3) == [LARGEST] * 3


def test_below_one_the_model_is_to_blame():
    scale = LossScale(2)
    scale.update(True)
    with pytest.raises(ValueError, match="at a loss scale of 1, and it must not fall below 1: the model"):
        scale.update(True)
    assert scale.value == 1


@given(st.lists(st.booleans(), max_size=60), st.lists(st.booleans(), max_size=60), st.integers(1, 7))
def test_it_goes_on_from_its_state_and_stays_a_power_of_two(before, after, grow_after):
    one, other = LossScale(2.0**23, grow_after), LossScale(grow_after=grow_after)
    values(one, before[:20])
    other.load(json.loads(json.dumps(one.state())))
    got = values(one, after[:3])
    assert values(other, after[:3]) == got
    assert all(1 <= value <= LARGEST and value.as_integer_ratio()[0].bit_count() == 1 for value in got)


@pytest.mark.parametrize("value, grow_after", [(0.5, 1), (LARGEST * 2, 1), (8, 0)])
def test_a_scale_out_of_range_is_refused(value, grow_after):
    with pytest.raises(ValueError, match="try 65536 and 2000"):
        LossScale(value, grow_after)
