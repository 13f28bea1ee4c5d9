"""The checkpoints that a folder keeps: their names, and how old ones leave it.

step_00000012 is a finished checkpoint, step_00000012.old one that a second save of step 12 has set aside,
step_00000012.tmp one that is being written or deleted. Deleting follows no link, and what cannot be deleted
is said and left there: a save has succeeded without it. Nothing else in the folder is touched.
"""
import errno
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from nanoinfra.train.checkpoint import manifest as disk

FULL = (errno.ENOSPC, errno.EDQUOT)          # what a full disk answers
Say = Callable[[str], object]


def checkpoints(root: str | Path) -> list[Path]:
    """The finished checkpoints in `root`, oldest first, good or not; a file of such a name is none.

    step_{n}.old counts as older than step_{n}.
    """
    root = Path(root)
    if not root.exists():
        return []
    with disk.naming(root):
        found = [path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}(\.old)?", path.name)]
    return sorted((path for path in found if path.is_dir()),
                  key=lambda path: (step_of(path), path.suffix != ".old"))


def folder_of(root: str | Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return Path(root) / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.stem.removeprefix("step_"))


def prune(final: Path, keep: int, say: Say) -> None:
    """Let go of all but the newest `keep` checkpoints up to `final`; later ones stay."""
    past = [path for path in checkpoints(final.parent) if step_of(path) <= step_of(final)]
    replaced = [path for path in past if path.suffix == ".old" and path.with_suffix("") in past]
    current = [path for path in past if path not in replaced]
    for path in replaced + current[:-keep]:
        _discard(path, say)


def sweep(root: Path, say: Say) -> None:
    """Delete what saves and deletions that a crash cut short have left in `root`."""
    for path in root.iterdir():
        if re.fullmatch(r"step_\d{8,}(\.old)?\.tmp", path.name) and (path.is_dir() or path.is_symlink()):
            _discard(path, say)


def make_way(path: Path, word: str) -> Path | None:
    """Give what is called `path` a free name, `path`.word if it is; returns it, None if nothing is there."""
    if not os.path.lexists(path):
        return None
    names = (path.with_name(f"{path.name}.{word}{i or ''}") for i in count())
    free = next(name for name in names if not os.path.lexists(name))
    os.rename(path, free)
    return free


def set_aside(final: Path, say: Say) -> None:
    """Make room for a second save of this step: the first is still a checkpoint, as step_{n}.old."""
    old = final.with_suffix(".old")
    if old.is_dir() or old.is_symlink():
        _discard(old, say)
    make_way(old, "left")                    # what could not be deleted
    os.rename(final, old)


def abandon_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that no run goes on from them; returns their new places."""
    return [make_way(path, "abandoned") for path in checkpoints(root) if step_of(path) > step]


def _discard(path, say):
    """Delete a checkpoint or the rest of one; of a link, the link alone."""
    gone = path if path.suffix == ".tmp" else path.with_name(f"{path.name}.tmp")
    try:
        if gone != path:
            os.rename(path, gone)            # half deleted, it is no checkpoint
        gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)
    except OSError as error:
        if error.errno in FULL:
            raise
        say(f"cannot delete {gone if gone.exists() else path}: {error.strerror or error}; the run goes on "
            "without that")
