import pytest

from nanoinfra.lab import predict as book
from nanoinfra.lab.predict import format_quantity, last_prediction, predict


def test_a_prediction_is_kept_with_its_history(course):
    predict("L02.bytes", 100, "B")
    predict("L02.bytes", 100, "B")
    predict("L02.bytes", 150, "B")
    assert last_prediction("L02.bytes") == (150, "B")
    assert book.read_predictions(course / "work" / "numbers.json")["L02.bytes"]["predicted"] == [100, 150]


def test_one_work_folder_for_a_notebook_and_a_terminal(course, monkeypatch):
    deep = course / "lessons" / "build" / "student"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    predict("L02.bytes", 1, "B")
    assert (course / "work" / "numbers.json").is_file()


@pytest.mark.parametrize("key, value", [("bytes", 1), ("L2.bytes", 1), ("L02.bytes", "many"),
                                        ("L02.bytes", float("nan")), ("L02.bytes", True)])
def test_what_is_no_prediction_is_refused(course, key, value):
    with pytest.raises(ValueError, match="prediction"):
        predict(key, value)
    assert not (course / "work" / "numbers.json").exists()


@pytest.mark.parametrize("key, unit, got", [
    ("L02.byte", "B", "'L02.byte'"), ("L02.bytes", "MB", "L02.bytes in 'MB'"),
    ("L03.none", "s", "'L03.none'")])
def test_what_the_lesson_does_not_ask_for_is_refused(course, key, unit, got):
    asked = "L02.bytes in B and L02.seconds in s" if key[:3] == "L02" else "L03.calls_each"
    with pytest.raises(ValueError, match=f"lesson {key[1:3]} asks for {asked}.*; got {got}$"):
        predict(key, 1, unit)
    assert not (course / "work" / "numbers.json").exists()
    predict("L97.anything", 1, "of its own")                       # a lesson without checks asks for nothing


@pytest.mark.parametrize("value, unit, want", [
    (1572864.0, "B", "1,572,864 B"), (0.0862, "s", "86.2 ms"), (2.5e-6, "s", "2.5 us"),
    (4, "calls", "4 calls"), (0.375, "", "0.375"), (0, "s", "0 s")])
def test_quantities_read_well(value, unit, want):
    assert format_quantity(value, unit) == want
