"""Where a course lies: `lessons/` with one folder a lesson, and beside it `work/` with a student's files.

The course folder is found upwards from the current folder, so that a notebook, a terminal and a rank process
meet in one `work/`. A lesson's modules are imported as `lessons.l08_zero.checks` from the course folder, or
from nanoinfra's own clone where the course folder holds no lesson; the package of a wheel has none.
"""
import sys
from pathlib import Path

_STUDENT_EDITION = ("lessons", "build", "student")      # built inside a course, it uses that one's work/


def course_folder() -> Path:
    """The nearest folder that holds `lessons/`, from the current folder upwards; else the current folder."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents)
                 if (folder / "lessons").is_dir() and folder.parts[-3:] != _STUDENT_EDITION), here)


def clone_folder() -> Path:
    """The folder of the clone of nanoinfra that this package runs from, as an editable install does."""
    return Path(__file__).resolve().parents[2]


def lessons_folder() -> Path:
    """The `lessons/` folder in use: the course's if it holds a lesson, else the one of the clone."""
    mine = course_folder() / "lessons"
    return mine if any(mine.glob("l[0-9][0-9]_*")) else clone_folder() / "lessons"


def lesson_folders(with_file: str = "") -> dict[str, Path]:
    """{"08": .../lessons/l08_zero} for all lessons in order, or for those that have the file `with_file`."""
    return {folder.name[1:3]: folder for folder in sorted(lessons_folder().glob("l[0-9][0-9]_*"))
            if (folder / with_file).exists()}


def make_lessons_importable() -> None:
    """Put the folder that holds `lessons/` first on sys.path, unless the package is imported already.

    Rank processes start with the sys.path of the process that starts them, so they find the same folder.
    """
    folder = str(lessons_folder().parent)
    if "lessons" not in sys.modules and sys.path[:1] != [folder]:
        sys.path.insert(0, folder)


def work_folder() -> Path:
    """The folder work/ with a student's files. It is made on first use."""
    folder = course_folder() / "work"
    folder.mkdir(exist_ok=True)
    return folder


def display_path(path: Path | str) -> str:
    """`path` as messages show it: relative to the course folder if it lies below that, else absolute."""
    path, folder = Path(path).resolve(), course_folder()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
