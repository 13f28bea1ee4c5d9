"""Notebooks from the percent files, which are the only source.

    python -m nanoinfra.lab.build lessons      lessons/NN_topic.py -> lessons/build/NN_topic.ipynb
    python -m nanoinfra.lab.build student      the same -> lessons/build/student/, by nbgrader's own steps:
                                               solutions cleared, hidden tests dropped, given cells locked
"""
import argparse
from pathlib import Path

from nanoinfra.lab.exercise import MARKER
from nanoinfra.lab.where import root, shown

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
NBGRADER = {"schema_version": 3, "solution": False, "grade": False, "locked": False, "task": False}


def build(edition: str, folder: Path | str | None = None, only: str = "") -> list[Path]:
    """Write the "lessons" or the "student" edition below `folder` (lessons/build); returns the notebooks."""
    import nbformat
    out = Path(folder or root() / "lessons" / "build") / ("student" if edition == "student" else "")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for source in sources(only):
        notebook = convert(source)
        notebook = clear(notebook) if edition == "student" else notebook
        files.append(out / source.with_suffix(".ipynb").name)
        nbformat.write(notebook, files[-1])
    return files


def sources(only: str = "") -> list[Path]:
    """The lessons' percent files in order, or those whose name starts with `only`. ValueError for none."""
    found = sorted((root() / "lessons").glob(f"{only or '[0-9][0-9]'}_*.py"))
    if not found:
        raise ValueError(f"no lesson {only or 'NN'}_topic.py in {root() / 'lessons'}; "
                         f"run this inside the repository, with a number that exists")
    return found


def convert(source: Path):
    """The notebook of one percent file, checked: a solution cell without markers would lose its prompt."""
    import jupytext
    notebook = jupytext.read(source)
    notebook.metadata = {"kernelspec": dict(KERNEL), "language_info": {"name": "python"}}       # never paired
    for i, cell in enumerate(notebook.cells):
        if "nbgrader" in cell.metadata:
            cell.metadata["nbgrader"] = {**NBGRADER, **cell.metadata["nbgrader"]}
        cell["id"] = f"{source.stem[:2]}-{i}"        # jupytext draws ids at random; one source, one notebook
        if cell.metadata.get("nbgrader", {}).get("solution") and MARKER not in cell.source:
            raise ValueError(f"{shown(source)}, cell {i + 1}: a solution cell without {MARKER!r} loses its "
                             f"prompt; mark what the student is to write")
    return notebook


def clear(notebook):
    """The student edition: what nbgrader's assign makes of it."""
    from nbgrader import preprocessors as steps
    for name in ("CheckCellMetadata", "LockCells", "ClearSolutions", "ClearOutput", "ClearHiddenTests",
                 "ClearMarkScheme"):
        notebook, _ = getattr(steps, name)().preprocess(notebook, {})
    return notebook


def main(argv: list[str] | None = None) -> None:
    """The command line: prints each notebook written."""
    parser = argparse.ArgumentParser(prog="python -m nanoinfra.lab.build", description="make notebooks")
    parser.add_argument("edition", choices=["lessons", "student"])
    parser.add_argument("--only", default="", help="a lesson's number, as 02")
    given = parser.parse_args(argv)
    for file in build(given.edition, only=given.only):
        print(shown(file))


if __name__ == "__main__":
    main()
