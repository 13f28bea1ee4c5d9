import pytest
from IPython.core.interactiveshell import InteractiveShell

from nanoinfra.lab import exercise

RING = "import torch\n\n\ndef ring(x):\n    y = 2 * x      # mine\n    return y\n"
SOLVED = "def ring(x):\n    ### BEGIN SOLUTION\n    return x\n    ### END SOLUTION\n"


def test_a_cell_is_kept_as_written_and_replaces_its_own_section(course):
    exercise.export_exercise("L02", "def first():\n    return 1\n")
    exercise.export_exercise("L02", RING)
    file = exercise.export_exercise("L02", "def first():\n    return 11\n")
    assert file == course / "work" / "L02.py"
    want = {"first": "def first():\n    return 11", "ring": RING.rstrip()}
    assert exercise.split_into_exercises(file.read_text()) == want
    module = exercise.load_python_file(file)
    assert (module.first(), module.ring(2)) == (11, 4)
    assert exercise.source_location(module.ring) == "work/L02.py"


def test_the_file_counts_as_it_is_now(course):
    file = exercise.export_exercise("L02", "def first():\n    return 1\n")
    assert exercise.load_python_file(file).first() == 1
    file.write_text(file.read_text().replace("1", "2"))            # same size, same second
    assert exercise.load_python_file(file).first() == 2


def test_the_reference_never_touches_a_students_file(course):
    mine = exercise.export_exercise("L02", RING)
    reference = exercise.export_exercise("L02", SOLVED)
    assert reference == course / "work" / "reference" / "L02.py"
    assert exercise.load_python_file(mine).ring(2) == 4
    exercise.refuse_reference_solution(mine)
    with pytest.raises(ValueError, match="is the reference"):
        exercise.refuse_reference_solution(reference)


def test_the_cell_magic_exports_and_then_runs(course, capsys):
    shell = InteractiveShell()
    shell.user_ns["forgotten"] = 7
    shell.run_line_magic("load_ext", "nanoinfra.lab.exercise")
    shell.run_cell_magic("exercise", "L02", RING)
    assert shell.user_ns["ring"](4) == 8
    assert "ring is in work/L02.py" in capsys.readouterr().out
    with pytest.raises(NameError):                                  # the file must stand alone
        shell.run_cell_magic("exercise", "L02", "def late(x):\n    return x\n\n\nforgotten")


@pytest.mark.parametrize("lesson, cell, said", [("02", RING, "names its lesson"),
                                                ("L02", "x = 1", "defines neither")])
def test_a_cell_that_cannot_be_kept_says_why(course, lesson, cell, said):
    with pytest.raises(ValueError, match=said):
        exercise.export_exercise(lesson, cell)


def test_extract_takes_every_exercise_of_a_percent_file(course):
    source = course / "lessons" / "02_x.py"
    source.write_text("# %%\nx = 1\n\n# %%\n# %%exercise L02\ndef a():\n    return 1\n\n\n"
                      "# %%\n# %%exercise L02\ndef b():\n    return a() + 1\n")
    (file,) = exercise.export_exercises_of_notebook(source, course)
    assert list(exercise.split_into_exercises(file.read_text())) == ["a", "b"]
    assert exercise.load_python_file(file).b() == 2


def test_a_decorated_function_is_the_students_all_the_same(course):
    file = exercise.export_exercise("L15",
                                    "import torch\n\n\n@torch.no_grad()\ndef generate(x):\n    return x\n")
    assert exercise.source_location(exercise.load_python_file(file).generate) == "work/L15.py"
