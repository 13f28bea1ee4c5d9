"""Where a student's work lies: in `work/` beside `lessons/`, found upwards from the current folder.

A notebook runs in `lessons/build/student/`, a terminal in the repository's root; both meet in one `work/`.
"""
from pathlib import Path


def root() -> Path:
    """The nearest folder from here upwards that holds `lessons/`; the current folder where none does."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "lessons").is_dir()), here)


def project() -> Path:
    """The folder of nanoinfra's own clone, where this package runs from one (as an editable install does)."""
    return Path(__file__).resolve().parents[2]


def work() -> Path:
    """The folder of a student's files, made on first use."""
    folder = root() / "work"
    folder.mkdir(exist_ok=True)
    return folder


def shown(path: Path | str) -> str:
    """`path` as a reader wants it: from the root where it lies below, whole otherwise."""
    path = Path(path).resolve()
    return str(path.relative_to(root())) if path.is_relative_to(root()) else str(path)
