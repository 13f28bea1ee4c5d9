import pytest

from nanoinfra.lab.compare_predictions import RELATIVE_TOLERANCE_BY_KIND, ComparisonRow, compare_predictions
from nanoinfra.lab.measure import counted, measure, median_of_times, modelled
from nanoinfra.lab.predict import predict

EXACT, TIMED = RELATIVE_TOLERANCE_BY_KIND["counted"], RELATIVE_TOLERANCE_BY_KIND["timed"]


@pytest.mark.parametrize("predicted, measured, tolerance, want", [
    (2 * (3 - 1) / 3 * 30, counted(40, "B"), EXACT, "pass"),        # a formula's last bit is no difference
    (1_000_000, counted(1_000_001, "B"), EXACT, "miss"),
    (0, counted(0, "B"), EXACT, "pass"),
    (0, counted(1, "B"), EXACT, "miss"),
    (1.0, median_of_times([1.09]), TIMED, "pass"),
    (1.0, median_of_times([1.11]), TIMED, "miss"),
    (1.0, median_of_times([0.89]), TIMED, "miss"),
    (100, counted(104, "B"), 0.05, "pass"),
    (100, counted(106, "B"), 0.05, "miss"),
    (1.0, median_of_times([5.0]), None, "shown"),
    (1.0, modelled(1.0, "s"), 0.1, "shown"),                        # a model that agrees with itself
])
def test_verdicts(predicted, measured, tolerance, want):
    assert ComparisonRow("x", predicted, measured, tolerance).verdict == want


def test_a_table_of_keys(course):
    predict("L02.bytes", 40, "B")
    predict("L02.seconds", 1.0, "s")
    measure("L02.bytes", lambda: counted(40, "B"))
    measure("L02.seconds", lambda: median_of_times([1.5]))
    table = compare_predictions(["L02.bytes", "L02.seconds"])
    assert not table.passed
    assert table.rows[1] == ("L02.seconds", "1 s", "1.5 s", "1.5", "timed, median of 1", "10%", "miss")
    assert "miss" in repr(table) and "<td" in table._repr_html_()
    assert compare_predictions(["L02.bytes", "L02.seconds"], tolerance={"L02.seconds": None}).passed


def test_a_second_prediction_shows(course):
    for guess in (30, 40):
        predict("L02.bytes", guess, "B")
        measure("L02.bytes", lambda: counted(40, "B"))
    (cells,) = compare_predictions(["L02.bytes"]).rows
    assert cells[1] == "40 B (2nd prediction)" and cells[-1] == "pass"
    predict("L02.bytes", 50, "B")
    assert compare_predictions(["L02.bytes"]).rows[0][1] == "50 B (3rd prediction)"


def test_a_table_that_judges_nothing_has_not_passed(course):
    assert not compare_predictions([ComparisonRow("x", 1.0, median_of_times([1.0]), None)]).passed


def test_what_is_not_measured_yet_says_so(course):
    predict("L02.bytes", 40, "B")
    with pytest.raises(ValueError, match="predicted but not measured yet"):
        compare_predictions(["L02.bytes"])
