import pytest

from nanoinfra.lab import predict as book
from nanoinfra.lab.predict import predict, predicted, quantity


def test_a_prediction_is_kept_with_its_history(course):
    predict("L02.bytes", 100, "B")
    predict("L02.bytes", 100, "B")
    predict("L02.bytes", 150, "B")
    assert predicted("L02.bytes") == (150, "B")
    assert book.read(course / "work" / "numbers.json")["L02.bytes"]["predicted"] == [100, 150]


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


@pytest.mark.parametrize("value, unit, want", [
    (1572864.0, "B", "1,572,864 B"), (0.0862, "s", "86.2 ms"), (2.5e-6, "s", "2.5 us"),
    (4, "calls", "4 calls"), (0.375, "", "0.375"), (0, "s", "0 s")])
def test_quantities_read_well(value, unit, want):
    assert quantity(value, unit) == want
