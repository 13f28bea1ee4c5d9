"""Checkpoint folders: their names, which of them a run keeps, and how old ones are deleted.

step_00000012 is a finished checkpoint; step_00000012.old is one that a second save of step 12 has set aside;
step_00000012.tmp is one that is being written or deleted. Deletion follows no symbolic link. A checkpoint
that cannot be deleted is reported and left: the save itself has succeeded. Other files are never touched.
"""
import errno
import os
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from nanoinfra.train.checkpoint import safetensors_and_manifest as disk

_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)          # the errors of a full disk
WarnFunction = Callable[[str], object]


def list_checkpoints(root: str | Path) -> list[Path]:
    """List the finished checkpoint folders in `root`, oldest first, without verifying them.

    step_{n}.old counts as older than step_{n}.
    """
    root = Path(root)
    if not root.exists():
        return []
    with disk.raise_as_checkpoint_error(root):
        found = [path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}(\.old)?", path.name)]
    return sorted((path for path in found if path.is_dir()),
                  key=lambda path: (checkpoint_step(path), path.suffix != ".old"))


def checkpoint_folder(root: str | Path, step: int) -> Path:
    """The path of the checkpoint of `step`."""
    return Path(root) / f"step_{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """The step number in a checkpoint's folder name."""
    return int(folder.stem.removeprefix("step_"))


def delete_old_checkpoints(final: Path, keep: int, warn: WarnFunction) -> None:
    """Delete all but the newest `keep` checkpoints up to `final`; checkpoints of later steps stay."""
    past = [path for path in list_checkpoints(final.parent)
            if checkpoint_step(path) <= checkpoint_step(final)]
    replaced = [path for path in past if path.suffix == ".old" and path.with_suffix("") in past]
    current = [path for path in past if path not in replaced]
    for path in replaced + current[:-keep]:
        _discard(path, warn)


def delete_unfinished_checkpoints(root: Path, warn: WarnFunction) -> None:
    """Delete the .tmp folders that crashed saves and deletions have left in `root`."""
    for path in root.iterdir():
        if re.fullmatch(r"step_\d{8,}(\.old)?\.tmp", path.name) and (path.is_dir() or path.is_symlink()):
            _discard(path, warn)


def rename_out_of_the_way(path: Path, suffix: str) -> Path | None:
    """Rename what is at `path` to a free name, first `path`.suffix; returns the new path, or None."""
    if not os.path.lexists(path):
        return None
    names = (path.with_name(f"{path.name}.{suffix}{i or ''}") for i in count())
    free = next(name for name in names if not os.path.lexists(name))
    os.rename(path, free)
    return free


def set_aside_for_second_save(final: Path, warn: WarnFunction) -> None:
    """Rename the checkpoint of this step to step_{n}.old, where it still counts as a checkpoint."""
    old = final.with_suffix(".old")
    if old.is_dir() or old.is_symlink():
        _discard(old, warn)
    rename_out_of_the_way(old, "left")                    # in case it could not be deleted
    os.rename(final, old)


def abandon_checkpoints_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that no run resumes from them; returns their new paths."""
    return [rename_out_of_the_way(path, "abandoned") for path in list_checkpoints(root)
            if checkpoint_step(path) > step]


def _discard(path, warn):
    """Delete a checkpoint or an unfinished one; of a symbolic link only the link."""
    gone = path if path.suffix == ".tmp" else path.with_name(f"{path.name}.tmp")
    try:
        if gone != path:
            os.rename(path, gone)            # half deleted, it must not look like a checkpoint
        gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            raise
        warn(f"cannot delete {gone if gone.exists() else path}: {error.strerror or error}; the run goes on "
             "without that")
