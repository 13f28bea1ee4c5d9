"""Replace the files of a model folder as one: a reader finds the old model, no model, or the new one.

New files are written into a staging folder inside it. Then config.json, without which no reader opens the
folder, is removed first and moved in last, so that weights of two models never stand beside a configuration.
"""
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.model.weights.read_json_files import fsync_path, read_json

_CONFIG_FILE, _STAGING_FOLDER = "config.json", ".new"
_REPLACED_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_FOREIGN_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "adapter_config.json")


@contextmanager
def replace_model_files(folder: Path, stale_patterns: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a staging folder to fill with config.json, weights and other files; then move them into `folder`.

    Old weights in `folder` are removed, and old files that match `stale_patterns`. Raises ValueError where
    the folder holds weights that an export does not write, or a training run.
    """
    _check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / _STAGING_FOLDER
    shutil.rmtree(new, ignore_errors=True)                       # left by an interrupted export
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            fsync_path(path)
        (folder / _CONFIG_FILE).unlink(missing_ok=True)
        fsync_path(folder)
        for path in [*_found(folder, _REPLACED_WEIGHTS), *_found(folder, stale_patterns)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in list(new.iterdir()):
            if path.name != _CONFIG_FILE:
                os.replace(path, folder / path.name)
        fsync_path(folder)
        os.replace(new / _CONFIG_FILE, folder / _CONFIG_FILE)
        fsync_path(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check(folder):
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if (folder / "checkpoints").exists() or "nanoinfra" in read_json(folder / _CONFIG_FILE):
        raise ValueError(f"{folder} holds a run, whose config.json an export would overwrite; name another "
                         "folder")
    if foreign := set(_found(folder, _FOREIGN_WEIGHTS)) - set(_found(folder, _REPLACED_WEIGHTS)):
        raise ValueError(f"{folder} holds {min(foreign).name}, weights that an export does not replace; name "
                         "another folder")


def _found(folder, patterns):
    return [path for pattern in patterns for path in folder.glob(pattern)]
