import nbformat
import pytest

from nanoinfra.lab.build_notebooks import build_notebooks

LESSON = '''# %% [markdown]
# # Lesson 42

# %% nbgrader={"grade_id": "a", "solution": true}
# %%exercise L42
def double(x):
    """Twice `x`."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% nbgrader={"grade_id": "b", "grade": true, "points": 1}
assert double(2) == 4
### BEGIN HIDDEN TESTS
assert double(21) == 42
### END HIDDEN TESTS

# %% [markdown] nbgrader={"grade_id": "c", "solution": true, "grade": true, "points": 1}
# <!-- ### BEGIN SOLUTION -->
# Because.
# <!-- ### END SOLUTION -->
'''


@pytest.fixture
def lesson(course):
    file = course / "lessons" / "l42_answers" / "lesson.py"
    file.parent.mkdir()
    file.write_text(LESSON)
    (file.parent / "checks.py").write_text("CHECKS = ()")
    return file


def test_the_notebook_has_all_and_is_the_same_twice(lesson, course):
    (file,) = build_notebooks("lessons")
    assert file == course / "lessons" / "build" / "l42_answers.ipynb"
    first, notebook = file.read_bytes(), nbformat.read(file, 4)
    nbformat.validate(notebook)
    assert notebook.cells[1].source.startswith("%%exercise L42\ndef double")
    assert "return 2 * x" in notebook.cells[1].source
    assert notebook.metadata.kernelspec.name == "python3"
    build_notebooks("lessons")
    assert file.read_bytes() == first


def test_the_student_edition_keeps_prompts_and_has_no_solution(lesson, course):
    (file,) = build_notebooks("student")
    assert file == course / "lessons" / "build" / "student" / "lessons" / "l42_answers" / "l42_answers.ipynb"
    text, cells = file.read_text(), nbformat.read(file, 4).cells
    for gone in ("SOLUTION", "HIDDEN", "2 * x", "Because", "double(21)"):
        assert gone not in text
    *prompt, here, stub = cells[1].source.split("\n")
    assert prompt == ["%%exercise L42", "def double(x):", '    """Twice `x`."""']
    assert (here, stub) == ("    # YOUR CODE HERE", "    raise NotImplementedError()")
    assert cells[2].source == "assert double(2) == 4"
    assert cells[3].source == "YOUR ANSWER HERE"
    assert not {"jupytext"} & set(nbformat.read(file, 4).metadata)
    assert cells[1].metadata.nbgrader.solution and cells[2].metadata.nbgrader.points == 1


def test_checks_lie_beside_the_student_s_notebook_and_an_assignment_of_nbgrader_is_whole(lesson, course):
    (file,) = build_notebooks("student")
    assert sorted(path.name for path in file.parent.iterdir()) == ["checks.py", "l42_answers.ipynb"]
    tree = course / "lessons" / "build" / "nbgrader"
    for step, solved in (("source", True), ("release", False)):
        assignment = tree / step / "l42_answers"
        assert ("2 * x" in (assignment / "l42_answers.ipynb").read_text()) == solved
        assert (assignment / "lessons" / "l42_answers" / "checks.py").is_file()
    assert "course_id" in (tree / "nbgrader_config.py").read_text()


def test_a_solution_cell_without_markers_is_refused(lesson):
    lesson.write_text(LESSON.replace("    ### BEGIN SOLUTION\n", "").replace("    ### END SOLUTION\n", ""))
    with pytest.raises(ValueError, match="l42_answers/lesson.py, cell 2: .* loses its prompt"):
        build_notebooks("lessons")


def test_outside_a_course_or_for_an_unknown_number_it_says_so(lesson):
    with pytest.raises(ValueError, match="no lesson l43_topic/lesson.py"):
        build_notebooks("student", lesson_number="43")
