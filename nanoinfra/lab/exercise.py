"""The cell magic `%%exercise L02` writes a cell to `work/L02.py` as the student wrote it, and runs that file.

The file has one section for each exercise, named after the first function or class of its cell; a cell that
runs again replaces its section. Checks, rank processes and grading load the file, so an exercise imports all
that it uses. A cell with solution markers is the reference solution: it goes to `work/reference/`.
"""
import inspect
import linecache
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from nanoinfra.lab.find_course_folder import display_path, make_lessons_importable, work_folder

SOLUTION_MARKER = "### BEGIN SOLUTION"
_TITLE = re.compile(r"^# %% exercise (\w+)\n", re.MULTILINE)
_MAGIC = re.compile(r"^%%exercise +(L\d\d)[^\n]*\n")


def export_exercise(lesson: str, cell_source: str, folder: Path | None = None) -> Path:
    """Write a cell's source to its section of `folder`/L02.py (default work/); returns that file."""
    if not re.fullmatch(r"L\d\d", lesson):
        raise ValueError(f"an exercise names its lesson, as in %%exercise L02; got {lesson!r}")
    folder = folder or (work_folder() / "reference" if SOLUTION_MARKER in cell_source else work_folder())
    folder.mkdir(exist_ok=True)
    file = folder / f"{lesson}.py"
    parts = split_into_exercises(file.read_text()) if file.exists() else {}
    parts[_name(cell_source)] = cell_source.rstrip("\n")
    file.write_text("\n\n\n".join(f"# %% exercise {name}\n{text}" for name, text in parts.items()) + "\n")
    return file


def split_into_exercises(exported_text: str) -> dict[str, str]:
    """{exercise name: source of its cell} of the text of an exported file."""
    _, *found = _TITLE.split(exported_text)
    return {name: cell.rstrip("\n") for name, cell in zip(found[::2], found[1::2])}


def load_python_file(file: Path | str) -> ModuleType:
    """Run a Python file and return it as a new module. Each call runs the file again."""
    file = Path(file).resolve()
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    linecache.checkcache(str(file))
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    return module


def source_location(function_or_class: Callable) -> str:
    """The file in which a function or class was written, as `work/L02.py`, or else its module's name."""
    is_class = isinstance(function_or_class, type)
    function = function_or_class.__init__ if is_class else inspect.unwrap(function_or_class)
    code = getattr(function, "__code__", None)                        # as under @torch.no_grad()
    file = Path(code.co_filename) if code else Path("<none>")
    module = getattr(function_or_class, "__module__", None)
    return display_path(file) if file.is_file() else module or "a notebook cell"


def refuse_reference_solution(file: Path | str) -> None:
    """Raise ValueError if `file` has the markers of a reference solution."""
    if SOLUTION_MARKER in Path(file).read_text():
        raise ValueError(f"{display_path(file)} is the reference (by its markers): its grade says nothing; "
                         f"grade what the student edition wrote to work/, or say --reference")


def export_exercises_of_notebook(notebook: Path | str, folder: Path | str) -> list[Path]:
    """Export all exercise cells of a notebook (.ipynb or percent file) to `folder`; returns the files."""
    import jupytext  # of the lessons extra; ranks that load an exercise do without
    files = []
    for cell in jupytext.read(notebook).cells:
        if magic := _MAGIC.match(cell.source):
            files.append(export_exercise(magic[1], cell.source[magic.end():], Path(folder)))
    return list(dict.fromkeys(files))


def load_ipython_extension(shell) -> None:
    """IPython's `%load_ext nanoinfra.lab.exercise` calls this: it registers `%%exercise`."""
    make_lessons_importable()

    def exercise(line, cell):
        file = export_exercise(line.strip(), cell)
        names = {k: v for k, v in vars(load_python_file(file)).items() if not k.startswith("__")}
        shell.user_ns.update(names)
        print(f"{_name(cell)} is in {display_path(file)}")
    shell.register_magic_function(exercise, "cell")


def _name(cell):
    found = re.search(r"^(?:def|class) (\w+)", cell, re.MULTILINE)
    if not found:
        raise ValueError("an exercise cell defines a function or a class, after which its section is named; "
                         "this one defines neither")
    return found[1]
