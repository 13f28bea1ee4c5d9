import time

import pytest

from nanoinfra.lab import predict as book
from nanoinfra.lab.measure import Measurement, counted, measure, median_of_times, timed
from nanoinfra.lab.predict import predict


def test_nothing_is_measured_before_it_is_predicted(course):
    calls = []
    with pytest.raises(ValueError, match="nothing is predicted for L02.bytes yet"):
        measure("L02.bytes", lambda: calls.append("ran") or counted(3, "B"))
    assert calls == []
    predict("L02.bytes", 5, "B")
    got = measure("L02.bytes", lambda: counted(3, "B"))
    assert got == counted(3, "B")
    assert book.read_predictions()["L02.bytes"]["measured"]["value"] == 3


@pytest.mark.parametrize("result, said", [(3, "must return a Measurement"),
                                          (counted(3, "s"), "predict it again")])
def test_a_measurement_says_its_kind_and_has_the_predicted_unit(course, result, said):
    predict("L02.bytes", 5, "B")
    with pytest.raises(ValueError, match=said):
        measure("L02.bytes", lambda: result)
    assert "measured" not in book.read_predictions()["L02.bytes"]


def test_a_time_is_a_median_with_its_spread_and_machine():
    got = median_of_times([3.0, 1.0, 2.0])
    assert (got.value, got.kind, got.n, got.spread) == (2.0, "timed", 3, 2.0)
    assert "cores" in got.machine


def test_timed_calls_once_to_warm_up_and_n_times_to_count():
    calls = []
    got = timed(lambda: calls.append(time.sleep(0.002)), n=3)
    assert len(calls) == 4 and got.n == 3 and 0.002 <= got.value


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="guessed"):
        Measurement(1, "s", "guessed")
