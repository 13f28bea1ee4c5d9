"""Notebooks from the lessons' percent files, which are the only source.

    python -m nanoinfra.lab.build_notebooks lessons    lessons/lNN_topic/lesson.py -> lessons/build/*.ipynb
    python -m nanoinfra.lab.build_notebooks student    a course for students: lessons/build/student;
                                                       nbgrader's own tree: lessons/build/nbgrader

The student edition is made by nbgrader's own steps: solutions cleared, hidden tests dropped, given cells
locked.
"""
import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nanoinfra.lab.exercise import SOLUTION_MARKER
from nanoinfra.lab.find_course_folder import course_folder, display_path, lesson_folders, lessons_folder

if TYPE_CHECKING:
    from nbformat import NotebookNode  # of the lessons extra

_KERNEL_SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
_NBGRADER_DEFAULTS = {"schema_version": 3, "solution": False, "grade": False, "locked": False, "task": False}
_NBGRADER_CONFIG = 'c = get_config()\nc.CourseDirectory.course_id = "nanoinfra"\n'


def build_notebooks(edition: str, output_folder: Path | str | None = None,
                    lesson_number: str = "") -> list[Path]:
    """Write the "lessons" or the "student" edition of one lesson or of all; returns the notebooks' files.

    `output_folder` is lessons/build by default. ValueError for a lesson that does not exist.
    """
    out = Path(output_folder or course_folder() / "lessons" / "build")
    if edition == "student":
        return [_write_student_edition(lesson, out) for lesson in find_lesson_sources(lesson_number)]
    return [_write_notebook(convert_to_notebook(lesson / "lesson.py"), out, lesson.name)
            for lesson in find_lesson_sources(lesson_number)]


def find_lesson_sources(lesson_number: str = "") -> list[Path]:
    """The folders of all lessons that have a lesson.py, or of lesson "02" alone. ValueError for none."""
    found = [folder for number, folder in lesson_folders(with_file="lesson.py").items() 
             if lesson_number in ("", number)]
    if not found:
        raise ValueError(f"no lesson l{lesson_number or 'NN'}_topic/lesson.py in {lessons_folder()}; "
                         f"run this inside the repository, with a number that exists")
    return found


def _write_student_edition(lesson, out):
    """The lesson's folder as students get it, and nbgrader's assignment: a course of one lesson."""
    notebook = convert_to_notebook(lesson / "lesson.py")
    mine = _copy_lesson(lesson, out / "student")
    file = _write_notebook(clear_solutions(notebook), mine, lesson.name)
    for step, edition in (("source", notebook), ("release", clear_solutions(notebook))):
        assignment = out / "nbgrader" / step / lesson.name
        _copy_lesson(lesson, assignment)
        _write_notebook(edition, assignment, lesson.name)
    (out / "nbgrader" / "nbgrader_config.py").write_text(_NBGRADER_CONFIG)
    return file


def _copy_lesson(lesson, course):
    """Copy what a lesson has beside its source to `course`/lessons; returns the folder there."""
    target = course / "lessons" / lesson.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(lesson, target, ignore=shutil.ignore_patterns("lesson.py", "__pycache__"))
    for file in [*lesson.parent.glob("*.py"), *lesson.parent.glob("*.md")]:
        shutil.copy(file, target.parent)
    return target


def _write_notebook(notebook, folder, name):
    import nbformat
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.ipynb"
    nbformat.write(notebook, file)
    return file


def convert_to_notebook(percent_file: Path) -> "NotebookNode":
    """The notebook (nbformat) of a percent file. ValueError for a solution cell without solution markers."""
    import jupytext
    notebook = jupytext.read(percent_file)
    # jupytext's own metadata would pair the notebook with its source
    notebook.metadata = {"kernelspec": dict(_KERNEL_SPEC), "language_info": {"name": "python"}}
    for i, cell in enumerate(notebook.cells):
        if "nbgrader" in cell.metadata:
            cell.metadata["nbgrader"] = {**_NBGRADER_DEFAULTS, **cell.metadata["nbgrader"]}
        cell["id"] = f"{percent_file.parent.name[1:3]}-{i}"  # jupytext draws ids at random
        if cell.metadata.get("nbgrader", {}).get("solution") and SOLUTION_MARKER not in cell.source:
            raise ValueError(f"{display_path(percent_file)}, cell {i + 1}: a solution cell without "
                             f"{SOLUTION_MARKER!r} loses its prompt; mark what the student is to write")
    return notebook


def clear_solutions(notebook: "NotebookNode") -> "NotebookNode":
    """A copy of a notebook without solutions, outputs and hidden tests, by nbgrader's preprocessors."""
    from copy import deepcopy

    from nbgrader import preprocessors as steps
    notebook = deepcopy(notebook)
    for name in ("CheckCellMetadata", "LockCells", "ClearSolutions", "ClearOutput", "ClearHiddenTests",
                 "ClearMarkScheme"):
        notebook, _ = getattr(steps, name)().preprocess(notebook, {})
    return notebook


def main(argv: list[str] | None = None) -> None:
    """Run the command line, and print each notebook that was written."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.build_notebooks",
                                     description="make notebooks")
    parser.add_argument("edition", choices=["lessons", "student"])
    parser.add_argument("--only", default="", help="a lesson's number, as 02")
    given = parser.parse_args(argv)
    for file in build_notebooks(given.edition, lesson_number=given.only):
        print(display_path(file))


if __name__ == "__main__":
    main()
