import pytest
import torch

from nanoinfra.lab.check import (
    Check,
    CheckFailed,
    CriterionBlocked,
    CriterionNotMet,
    load_lesson_checks,
    rank_pool_for_checks,
)
from nanoinfra.lab.compare_tensors import assert_same_tensor


def even(speed=None):
    check = Check("even")
    check.criterion("is even", "property")(lambda f: _expect(f() % 2 == 0, "odd"))
    check.criterion("is small", "resource")(lambda f: _expect(f() < 10, "large"))
    if speed:
        check.criterion("is fast", "speed")(speed)
    return check


def _expect(right, text):
    if not right:
        raise CriterionNotMet(text)


def states(report):
    return [v.state for v in report.verdicts]


def test_the_first_wrong_criterion_ends_the_check():
    assert states(even().report(lambda: 4)) == ["pass", "pass"]
    report = even().report(lambda: 3)
    assert states(report) == ["wrong", "not run"]
    assert (report.points_earned, report.exit_code, report.first_failure.text) == (0, 1, "odd")
    assert states(even().report(lambda: 12)) == ["pass", "wrong"]


def test_blocked_is_never_a_pass():
    def no_gpu(_):
        raise CriterionBlocked("needs a CUDA device")
    report = even(no_gpu).report(lambda: 4)
    assert states(report) == ["pass", "pass", "blocked"]
    assert (report.exit_code, report.points_earned) == (2, 2)
    assert even(no_gpu).report(lambda: 3).exit_code == 1
    with pytest.raises(CheckFailed, match="needs a CUDA device"):
        even(no_gpu)(lambda: 4)


def test_a_check_without_criteria_is_not_passed():
    assert Check("empty").report(lambda: 1).exit_code == 2


def test_what_is_not_written_yet_is_wrong_and_says_so():
    def starter():
        raise NotImplementedError()
    assert even().report(starter).first_failure.text == "not written yet"
    assert "ZeroDivisionError" in even().report(lambda: 1 / 0).first_failure.text
    text = even().report(lambda: undefined).first_failure.text                         # noqa: F821
    assert text.startswith("NameError") and "import inside the exercise cell" in text


def test_in_a_notebook_a_failure_shows_table_and_reason_without_a_traceback():
    with pytest.raises(CheckFailed) as failed:
        even()(lambda: 3)
    (text,) = failed.value._render_traceback_()
    assert "is even: odd" in text and "not run" in text


def test_layers_come_in_order():
    check = even()
    with pytest.raises(ValueError, match="property, parity, resource, speed"):
        check.criterion("late", "parity")


def test_lessons_are_found_by_number():
    assert load_lesson_checks("2") is load_lesson_checks("02") is load_lesson_checks("L02")
    assert [c.name for c in load_lesson_checks("02").CHECKS] == ["ring_reduce_scatter", "ring_all_reduce"]
    with pytest.raises(ValueError, match="has no checks"):
        load_lesson_checks("99")


@pytest.mark.parametrize("got, said", [
    (torch.full((2, 3), 4.0), r"rank 1: `w` differs at \[0, 0\]: want 1, got 4, 4 x \(6 of 6\): summed inst"),
    (torch.full((2, 3), 0.25), "averaged instead of summed"),
    (torch.tensor([[1, 1, 1], [1, 1, 0.0]]), r"at \[1, 2\]: want 1, got 0, 0 x \(1 of 6\)$"),
    (torch.full((2, 3), float("nan")), "not a number"),
    (torch.full((2, 3), 7.824), r"got 7.824 \(6 of 6\)$"),        # a ratio by chance says nothing
    (torch.full((2, 3), 1 + 2**-20), "want 1, got 1.0000009536743164 .*rounding"),
    (torch.ones(3, 2), r"shape \(3, 2\), want \(2, 3\)"),
    (torch.ones(2, 3).double(), "torch.float64, want torch.float32"),
    (None, "NoneType"),
    (torch.full((2, 3), 7.0), "forgot the seven"),
])
def test_a_difference_is_named(got, said):
    with pytest.raises(CriterionNotMet, match=said):
        assert_same_tensor("w", got, torch.ones(2, 3), rank=1, axis_size=4,
                           likely_causes={"forgot the seven": torch.full((2, 3), 7.0)})


def test_same_allows_rounding_only_where_told():
    want, got = torch.tensor([1.0, 1e-9]), torch.tensor([1.0, 1.1e-9])
    assert_same_tensor("w", got, want, rank=0, rtol=1e-8)
    with pytest.raises(CriterionNotMet):
        assert_same_tensor("w", got, want, rank=0)


def test_a_loaded_machine_is_waited_for_longer(monkeypatch):
    for load, want in ((0.5, 15.0), (20.0, 15.0 * 20 / 4)):
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert rank_pool_for_checks(1).timeout == want and rank_pool_for_checks(1) is rank_pool_for_checks(1)
