"""Checkpoints that any mesh can resume, and that a crash at any byte leaves usable.

A checkpoint is the folder step_00000012: each rank's pieces in rank{r}.safetensors, state.json, and, written
last, manifest.json. All is written to step_00000012.tmp, fsynced and renamed, so a finished name stands for
finished bytes, and `verify` (train/manifest.py) checks them. A save writes every logical byte once:
of equal pieces the first rank's is kept. Nothing is pickled. Composes with every parallelism through `Piece`
(train/pieces.py); ranks on several machines need a folder that all of them see.
"""
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from nanoinfra.dist import comm
from nanoinfra.train import manifest as disk
from nanoinfra.train.manifest import verify
from nanoinfra.train.pieces import CheckpointError, Piece, check_cover

Pairs = Mapping[Piece, torch.Tensor] | Iterable[tuple[Piece, torch.Tensor]]


def save(root: str | Path, step: int, tensors: Pairs, state: dict, axis, keep: int = 2) -> Path:
    """Save each rank's pieces and rank 0's `state` (for JSON) in the folder `root`/step_{step}; returns it.

    Every rank of `axis` calls it. Afterwards the newest `keep` checkpoints up to this step remain. Where any
    rank fails, all raise one CheckpointError; the unfinished is removed, what was there before is untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just saved; keep at least 1")
    final = Path(root) / f"step_{step:08d}"
    tmp, me = final.with_suffix(".tmp"), f"rank{axis.rank}.safetensors"
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    try:
        entries = _deal(_together(axis, lambda: _prepare(tmp, pairs, axis.rank)))
        mine = [pair for pair in pairs if (me, pair[0]) in disk.sources(pair[0].name, entries[pair[0].name])]
        written = _together(axis, lambda: disk.write_tensors(tmp / me, mine))
        files = {f"rank{rank}.safetensors": listed for rank, listed in enumerate(written)}
        body = {"format": disk.FORMAT, "step": step, "files": files, "tensors": entries}
        _together(axis, lambda: axis.rank == 0 and _publish(tmp, final, body, state, keep))
    except CheckpointError as failure:
        left = _together(axis, lambda: axis.rank == 0 and _give_up(tmp))[0]
        raise CheckpointError(f"cannot save step {step}: {failure}; {left}") from failure
    return final


def newest(root: str | Path, say: Callable[[str], object] = print) -> Path | None:
    """The newest checkpoint in `root` that verifies, or None; `say` is told each one refused, and why.

    Reads every byte of what it tries: on N ranks call `newest_of_all`.
    """
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
            return folder
        except CheckpointError as reason:
            say(f"refused checkpoint {folder.name}: {reason}")
    return None


def newest_of_all(root: str | Path, axis, say: Callable[[str], object] = print) -> Path | None:
    """`newest` as the axis's first rank finds it; the others take its word."""
    found = newest(root, say) if axis.rank == 0 else None
    name = comm.gather_objects(found and found.name, axis, "checkpoint")[0]
    return Path(root) / name if name else None


def load(folder: str | Path, wanted: Iterable[Piece],
         verified: dict | None = None) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Yield each wanted piece with its tensor (CPU, of the stored dtype), reading only the ranges it needs.

    `verified` is what `verify(folder)` returned, here or on another rank; without it this verifies first.
    Raises CheckpointError for a name that is not there, or one whose full shape is another.
    """
    folder = Path(folder)
    entries = (verified or verify(folder))["tensors"]
    with ExitStack() as stack:
        @functools.cache
        def opened(file):
            return stack.enter_context(safe_open(folder / file, framework="pt"))
        for piece in wanted:
            yield piece, _read(piece, _entry(piece, entries, folder), opened)


def catalog(folder: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (full shape, dtype)} of every tensor in the checkpoint."""
    entries = disk.read_manifest(Path(folder))["tensors"]
    return {name: (tuple(entry["shape"]), disk.dtype_of(entry["dtype"])) for name, entry in entries.items()}


def read_state(folder: str | Path) -> dict:
    """The `state` given to `save`, checked against the manifest."""
    path = Path(folder) / "state.json"
    disk.check_file(path, disk.read_manifest(path.parent)["files"][path.name])
    return json.loads(path.read_bytes())


def checkpoints(root: str | Path) -> list[Path]:
    """The finished checkpoints in `root`, oldest first, good or not.

    step_00000012.old is one that a second save of step 12 set aside; it counts as older than step_00000012.
    """
    root = Path(root)
    if not root.exists():
        return []
    with disk.naming(root):
        found = [path for path in root.iterdir() if re.fullmatch(r"step_\d{8,}(\.old)?", path.name)]
    return sorted(found, key=lambda path: (_step(path), path.suffix != ".old"))


def _together(axis, work):
    """Each rank's result of `work()`, on every rank; where any of them failed, every rank raises."""
    failure = None
    try:
        mine = {"done": work()}
    except (OSError, ValueError, TypeError) as error:
        failure, mine = error, {"failed": _reason(error)}
    results = comm.gather_objects(mine, axis, "checkpoint")
    failed = [f"rank {rank}: {result['failed']}" for rank, result in enumerate(results) if "failed" in result]
    if failed:
        more = f" (and {len(failed) - 1} more of {axis.size} ranks)" if failed[1:] else ""
        raise CheckpointError(failed[0] + more) from failure
    return [result["done"] for result in results]


def _reason(error):
    named = isinstance(error, OSError) and error.filename
    return f"{error.filename}: {error.strerror}" if named else str(error)


def _prepare(tmp, pairs, rank):
    """Rank 0 makes an empty folder; each rank tells what it holds."""
    if rank == 0:
        root = tmp.parent
        if not root.exists():
            root.mkdir(parents=True)
            disk.fsync_folder(root.parent)
        for path in root.iterdir():
            if re.fullmatch(r"step_\d{8,}(\.old)?\.tmp", path.name):          # a crash cut that save short
                shutil.rmtree(path)
        tmp.mkdir()
    return [[piece.name, piece.offset, piece.size, piece.full, disk.dtype_name(x)] for piece, x in pairs]


def _deal(held):
    """The manifest's entry of each tensor, every piece to be written by the first rank that holds it."""
    entries = {}
    for rank, rows in enumerate(held):
        for name, offset, size, full, dtype in rows:
            entry = entries.setdefault(name, {"shape": full, "dtype": dtype, "pieces": []})
            if (entry["shape"], entry["dtype"]) != (full, dtype):
                raise CheckpointError(f"tensor {name}: rank {rank} holds it as {dtype} {full}, a rank "
                                      f"before it as {entry['dtype']} {entry['shape']}")
            box = {"offset": offset, "size": size}
            if prod(size) and all(part != {**part, **box} for part in entry["pieces"]):
                entry["pieces"].append({"file": f"rank{rank}.safetensors", **box})
    for name, entry in entries.items():
        check_cover([piece for _, piece in disk.sources(name, entry)], name, entry["shape"])
    return entries


def _publish(tmp, final, body, state, keep):
    """Complete the folder, make it durable, give it its name, and only then let old ones go."""
    text = json.dumps(state, indent=1).encode()
    body["files"]["state.json"] = disk.write_file(tmp / "state.json", [text])
    disk.write_file(tmp / "manifest.json", [disk.seal(body)])
    disk.fsync_folder(tmp)
    if final.exists():
        _set_aside(final)
    os.rename(tmp, final)
    disk.fsync_folder(final.parent)
    _prune(final, keep)


def _set_aside(final):
    old = final.with_suffix(".old")
    if old.exists():
        _discard(old)
    os.rename(final, old)                              # still a checkpoint, should the next line not run


def _prune(final, keep):
    past = [path for path in checkpoints(final.parent) if _step(path) <= _step(final)]
    replaced = [path for path in past if path.suffix == ".old" and path.with_suffix("") in past]
    current = [path for path in past if path not in replaced]
    for path in replaced + current[:-keep]:
        _discard(path)


def _discard(folder):
    gone = folder.with_name(f"{folder.name}.tmp")      # half deleted, it is no checkpoint
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _give_up(tmp):
    """Remove what was begun; returns what is left, in words."""
    shutil.rmtree(tmp, ignore_errors=True)
    good = newest(tmp.parent, say=lambda refused: None)
    left = f"the last good checkpoint is {good}" if good else f"there is no good checkpoint in {tmp.parent}"
    return f"{left}; delete {tmp} by hand" if tmp.exists() else left


def _step(folder):
    return int(folder.stem.removeprefix("step_"))


def _entry(piece, entries, folder):
    entry = entries.get(piece.name)
    if entry is None:
        raise CheckpointError(f"{folder}: has no tensor {piece.name!r} among its {len(entries)}")
    if tuple(entry["shape"]) != piece.full:
        raise CheckpointError(f"{folder}: tensor {piece.name!r} has shape {entry['shape']}, not the wanted "
                              f"{list(piece.full)}")
    return entry


def _read(piece, entry, opened):
    out = torch.empty(piece.size, dtype=disk.dtype_of(entry["dtype"]))
    for file, source in disk.sources(piece.name, entry):
        common = piece.overlap(source)
        if common:
            out[common.within(piece)] = opened(file).get_slice(source.key)[common.within(source)]
    return out
