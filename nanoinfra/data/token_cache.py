"""A folder that is either whole or absent: what several ranks may build at once without harming each other.

Everyone who finds it missing writes a copy of their own beside it; one rename puts the first copy in place,
the others throw theirs away. A process killed half-way leaves a stray `tmp*` folder and no entry. An entry
lists the SHA-256 of its files; whoever opens it verifies them, at 1 to 2 GB/s, and what is not as it was
written is removed, said and built again. Holds the tokenizer and the packed tokens, under names that carry
the hash of all they were made from.
"""
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

FORMAT = "v2"                  # raise it with any change to how an entry is made: old ones are then ignored
CONTENT, SUMS = "content", "sha256.json"     # an entry: a folder of files, and {name: SHA-256} of them


def cached_folder(name: str, fill: Callable[[Path], None], cache: str | Path | None = None) -> Path:
    """A folder with the files that `fill(folder)` writes, which is called where the cache has them not.

    `cache` is ~/.cache/nanoinfra by default. Raises ValueError where it cannot be written.
    """
    root = cache_root(cache)
    entry = root / name
    try:
        if not _is_whole(entry):
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=root) as own:
                _write(Path(own) / name, fill)
                _put(Path(own) / name, entry)
    except OSError as error:
        raise _unwritable(root, error) from error
    return entry / CONTENT


def cache_root(cache: str | Path | None = None) -> Path:
    """Where entries lie: in `cache`, else $XDG_CACHE_HOME/nanoinfra, else ~/.cache/nanoinfra.

    Raises ValueError where neither says a folder, nor the system for this user.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if cache is not None:
        return Path(cache) / FORMAT
    if os.path.isabs(given):                 # by its specification others do not count
        return Path(given) / "nanoinfra" / FORMAT
    try:
        return Path.home() / ".cache" / "nanoinfra" / FORMAT
    except RuntimeError as error:
        raise ValueError(f"there is no home folder to keep tokenizer and tokens in ({error}); set "
                         "XDG_CACHE_HOME or HOME to a folder that can be written") from error


def check_cache() -> None:
    """Make the folder of the cache. Raises ValueError where it is not there and cannot be made."""
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error


def _unwritable(root, error):
    return ValueError(f"the cache {root} cannot be written ({error.strerror or error}); make room there, "
                      "or set XDG_CACHE_HOME to a folder that can be written")


def _write(entry, fill):
    content = entry / CONTENT
    content.mkdir(parents=True)
    fill(content)
    sums = {path.name: _sha256(path) for path in sorted(content.iterdir())}
    (entry / SUMS).write_text(json.dumps(sums, indent=2))


def _put(own, entry):
    try:
        os.rename(own, entry)
    except OSError:
        if not (entry / CONTENT).is_dir():   # a folder that is there is another rank's, equal to ours
            raise


def _is_whole(entry):
    """Is it there, every byte as it was written? What is not is taken out of the way."""
    if (looked_at := _inode(entry)) is None:
        return False
    if fault := _fault(entry):
        print(f"nanoinfra: {entry} {fault}; it is made again", file=sys.stderr, flush=True)
        if _inode(entry) == looked_at:       # else another rank has done it
            with TemporaryDirectory(dir=entry.parent) as aside, suppress(FileNotFoundError):
                os.rename(entry, Path(aside) / "bad")
    return not fault


def _fault(entry):
    """What is wrong with an entry, in words; None where nothing is."""
    try:
        listed, content = json.loads((entry / SUMS).read_bytes()), entry / CONTENT
        if not isinstance(listed, dict) or {path.name for path in content.iterdir()} != set(listed):
            return "holds other files than were written"
        changed = [name for name, sha256 in listed.items() if _sha256(content / name) != sha256]
        return f"is not as it was written: {', '.join(changed)} changed" if changed else None
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _inode(path):
    """What tells a folder from another of its name; None where there is none."""
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
