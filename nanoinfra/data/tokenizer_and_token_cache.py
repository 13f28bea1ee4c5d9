"""The on-disk cache of trained tokenizers and packed tokens; several ranks may build an entry at once.

Each process that finds an entry missing writes its own copy beside it; one rename puts the first copy in
place and the others are thrown away, so that an entry is complete or absent. A killed process leaves a stray
`tmp*` folder and no entry. An entry lists the SHA-256 of its files and is verified when opened (1 to 2 GB/s);
a damaged one is reported, removed and built again. Names of entries carry the hash of what they were made of.
"""
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

_CACHE_FORMAT = "v2"  # raise it with any change to how entries are made; older ones are then ignored
# an entry: a folder of files, and {name: SHA-256} of them
CHECKSUMS_FILE = "sha256.json"               # of an entry: {name: SHA-256} of the files in its folder
CONTENT_FOLDER = "content"


def get_or_build_folder(name: str, write_files: Callable[[Path], None],
                        cache: str | Path | None = None) -> Path:
    """Return the cached folder `name`; when it is missing or damaged, `write_files(folder)` fills it first.

    `cache` is ~/.cache/nanoinfra by default. Raises ValueError when it cannot be written.
    """
    root = _cache_root(cache)
    entry = root / name
    try:
        if not _is_whole(entry):
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=root) as own:
                _write(Path(own) / name, write_files)
                _put(Path(own) / name, entry)
    except OSError as error:
        raise _unwritable(root, error) from error
    return entry / CONTENT_FOLDER


def _cache_root(cache: str | Path | None = None) -> Path:
    """The cache folder: `cache`, else $XDG_CACHE_HOME/nanoinfra, else ~/.cache/nanoinfra.

    Raises ValueError when there is no home folder either.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if cache is not None:
        return Path(cache) / _CACHE_FORMAT
    if os.path.isabs(given):                 # by its specification others do not count
        return Path(given) / "nanoinfra" / _CACHE_FORMAT
    try:
        return Path.home() / ".cache" / "nanoinfra" / _CACHE_FORMAT
    except RuntimeError as error:
        raise ValueError(f"there is no home folder to keep tokenizer and tokens in ({error}); set "
                         "XDG_CACHE_HOME or HOME to a folder that can be written") from error


def make_cache_folder() -> None:
    """Make the cache folder. Raises ValueError when it does not exist and cannot be made."""
    root = _cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(root, error) from error


def _unwritable(root, error):
    return ValueError(f"the cache {root} cannot be written ({error.strerror or error}); make room there, "
                      "or set XDG_CACHE_HOME to a folder that can be written")


def _write(entry, write_files):
    content = entry / CONTENT_FOLDER
    content.mkdir(parents=True)
    write_files(content)
    sums = {path.name: _sha256(path) for path in sorted(content.iterdir())}
    (entry / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=2))


def _put(own, entry):
    try:
        os.rename(own, entry)
    except OSError:
        if not (entry / CONTENT_FOLDER).is_dir():   # another rank was first; its folder is equal
            raise


def _is_whole(entry):
    """Whether the entry exists with every byte as it was written; a damaged entry is removed."""
    if (looked_at := _identity(entry)) is None:
        return False
    if fault := _fault(entry):
        print(f"nanoinfra: {entry} {fault}; it is made again", file=sys.stderr, flush=True)
        if _identity(entry) == looked_at:    # else another rank has done it
            with TemporaryDirectory(dir=entry.parent) as aside, suppress(FileNotFoundError):
                os.rename(entry, Path(aside) / "bad")
    return not fault


def _fault(entry):
    """The fault of a damaged entry, in words; None when it is good."""
    try:
        listed, content = json.loads((entry / CHECKSUMS_FILE).read_bytes()), entry / CONTENT_FOLDER
        if not isinstance(listed, dict) or {path.name for path in content.iterdir()} != set(listed):
            return "holds other files than were written"
        changed = [name for name, sha256 in listed.items() if _sha256(content / name) != sha256]
        return f"is not as it was written: {', '.join(changed)} changed" if changed else None
    except (OSError, ValueError, RecursionError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _identity(path):
    """What tells a folder from another of the same name, None when there is none. Inodes are used again."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
