"""The files of a model's folder: JSON, read so that whatever is wrong with one is a line that names it.

Needs neither torch nor transformers.
"""
import json
import os
from pathlib import Path

POINTER = b"version https://git-lfs"         # how the text begins that Git LFS leaves in a file's place
LARGEST = 64 * 2**20                         # bytes of JSON: a hundred times what any index has


def read_json(path: Path) -> dict:
    """The JSON object in `path`, {} where there is no such file. Raises ValueError for anything else."""
    content = _content(path)
    if content is None:
        return {}
    try:
        got = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:              # of numbers with too many digits, too
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: its values nest too deep") from error
    if not isinstance(got, dict):
        raise ValueError(f"{path} holds a {type(got).__name__} where a JSON object belongs")
    return got


def check_content(path: Path) -> None:
    """Raise ValueError where `path` is no file, or is the pointer that Git LFS leaves in a file's place."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with git lfs pull, "
                             "or the whole folder with hf download")


def _content(path):
    try:
        if not path.exists():
            return None
        check_content(path)
        if (size := path.stat().st_size) > LARGEST:
            raise ValueError(f"{path} has {size} bytes, too many for what it should hold")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Make what is in a file or a folder durable: a file is lost with its name in the folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
