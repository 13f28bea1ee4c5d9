"""The files of a model's folder replaced together: a reader finds the old model, or none, or the new one.

New files are written into a folder of their own inside it. Then config.json, without which nobody opens a
folder, is the first to go and the last to come, so that weights of two models never stand beside a
configuration.
"""
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nanoinfra.model.weights.json_files import read_json, sync

CONFIG, NEW = "config.json", ".new"
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")    # replaced
FOREIGN = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.msgpack", "adapter_config.json")  # never replaced


@contextmanager
def replaced(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder, to be filled with a config.json, weights and whatever else; then all take their places.

    Of what `folder` held before, weights go, and the files called `stale`. ValueError where it holds weights
    that an export does not write, or a run.
    """
    _check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)                       # of an export that was cut off
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            sync(path)
        (folder / CONFIG).unlink(missing_ok=True)
        sync(folder)
        for path in [*_found(folder, WEIGHTS), *_found(folder, stale)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in list(new.iterdir()):
            if path.name != CONFIG:
                os.replace(path, folder / path.name)
        sync(folder)
        os.replace(new / CONFIG, folder / CONFIG)
        sync(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check(folder):
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    if (folder / "checkpoints").exists() or "nanoinfra" in read_json(folder / CONFIG):
        raise ValueError(f"{folder} holds a run, whose config.json an export would overwrite; name another "
                         "folder")
    if foreign := set(_found(folder, FOREIGN)) - set(_found(folder, WEIGHTS)):
        raise ValueError(f"{folder} holds {min(foreign).name}, weights that an export does not replace; name "
                         "another folder")


def _found(folder, patterns):
    return [path for pattern in patterns for path in folder.glob(pattern)]
