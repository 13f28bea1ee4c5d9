"""A folder that is either whole or absent: what several ranks may build at once without harming each other.

Everyone who finds it missing writes a copy of their own beside it; one rename puts the first copy in place,
the others throw theirs away. A process killed half-way leaves a stray `tmp*` folder and no entry. Holds the
tokenizer and the packed tokens, under names that carry the hash of all they were made from.
"""
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

FORMAT = "v1"                  # raise it with any change to how an entry is made: old ones are then ignored


def cached_folder(name: str, fill: Callable[[Path], None], cache: str | Path | None = None) -> Path:
    """Folder `name` of the cache (default ~/.cache/nanoinfra); `fill(folder)` writes it if it is missing.

    Raises ValueError where the cache cannot be written.
    """
    root = (Path(cache) if cache is not None else Path.home() / ".cache" / "nanoinfra") / FORMAT
    folder = root / name
    try:
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=root) as own:
                (Path(own) / name).mkdir()
                fill(Path(own) / name)
                _put(Path(own) / name, folder)
    except OSError as error:
        raise ValueError(f"the cache {root} cannot be written ({error.strerror or error}); make room there, "
                         "or set HOME to a folder that can be written") from error
    return folder


def _put(own: Path, folder: Path) -> None:
    try:
        os.rename(own, folder)
    except OSError:
        if not folder.is_dir():              # a folder that is there is another rank's, equal to ours
            raise
