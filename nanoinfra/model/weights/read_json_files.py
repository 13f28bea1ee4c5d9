"""Reading the JSON files of a model folder; every problem becomes a ValueError that names the file.

It needs neither torch nor transformers.
"""
import json
import os
from pathlib import Path

GIT_LFS_POINTER_START = b"version https://git-lfs"         # the first bytes of a Git LFS pointer file
MAX_JSON_BYTES = 64 * 2**20                         # a hundred times the largest index


def read_json(path: Path) -> dict:
    """The JSON object in `path`, or {} where there is no such file. Raises ValueError for anything else."""
    content = _content(path)
    if content is None:
        return {}
    try:
        got = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:              # also raised for a number with too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON: its values nest too deep") from error
    if not isinstance(got, dict):
        raise ValueError(f"{path} holds a {type(got).__name__} where a JSON object belongs")
    return got


def check_file_is_fetched(path: Path) -> None:
    """Raise ValueError where `path` is not a file, or is only a Git LFS pointer to one."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with path.open("rb") as file:
        if file.read(len(GIT_LFS_POINTER_START)) == GIT_LFS_POINTER_START:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself; fetch it with git lfs pull, "
                             "or the whole folder with hf download")


def _content(path):
    try:
        if not path.exists():
            return None
        check_file_is_fetched(path)
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"{path} has {size} bytes, too many for what it should hold")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def fsync_path(path: Path) -> None:
    """fsync a file or a folder. A new file needs both: without its folder's entry it is lost in a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
