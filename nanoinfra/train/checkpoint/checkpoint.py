"""Checkpoints that any mesh can resume, and that a crash at any byte leaves usable.

A checkpoint is the folder step_00000012: each rank's pieces in rank{r}.safetensors, state.json, and, written
last, manifest.json. All is written to step_00000012.tmp, fsynced and renamed, so a finished name stands for
finished bytes, and `verify` (train/checkpoint/manifest.py) checks them. A save writes every logical byte
once: of equal pieces the first rank's is kept. Nothing is pickled. Composes with every parallelism through
`Piece` (train/checkpoint/tensor_shards.py); ranks on several machines need a folder that all of them see.
"""
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from nanoinfra.distributed import comm
from nanoinfra.train.checkpoint import manifest as disk
from nanoinfra.train.checkpoint import retention
from nanoinfra.train.checkpoint.manifest import OtherVersion, verify
from nanoinfra.train.checkpoint.retention import Say, checkpoints, folder_of
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError, Piece, check_cover

Pairs = Mapping[Piece, torch.Tensor] | Iterable[tuple[Piece, torch.Tensor]]


def save(root: str | Path, step: int, tensors: Pairs, state: dict, axis, keep: int = 2,
         say: Say = print) -> Path:
    """Save each rank's pieces and rank 0's `state` (for JSON) in the folder `root`/step_{step}; returns it.

    Every rank of `axis` calls it. Afterwards the newest `keep` checkpoints up to this step remain; `say` is
    told what of the others cannot be deleted. Where any rank fails, all raise one CheckpointError; the
    unfinished is removed, what was there before is untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just saved; keep at least 1")
    final = folder_of(root, step)
    tmp, me = final.with_suffix(".tmp"), f"rank{axis.rank}.safetensors"
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    try:
        entries = _deal(_together(axis, lambda: _prepare(tmp, pairs, axis.rank, say)))
        mine = [pair for pair in pairs if (me, pair[0]) in disk.sources(pair[0].name, entries[pair[0].name])]
        written = _together(axis, lambda: disk.write_tensors(tmp / me, mine))
        files = {f"rank{rank}.safetensors": listed for rank, listed in enumerate(written)}
        body = {"format": disk.FORMAT, "step": step, "files": files, "tensors": entries}
        _together(axis, lambda: axis.rank == 0 and _publish(tmp, final, body, state, keep, say))
    except CheckpointError as failure:
        left = _together(axis, lambda: axis.rank == 0 and _give_up(tmp))[0]
        raise CheckpointError(f"cannot save step {step}: {failure}; {left}") from failure
    return final


def newest(root: str | Path, say: Say = print) -> Path | None:
    """The newest checkpoint in `root` that verifies, or None; `say` is told each one refused, and why.

    Reads every byte of what it tries: on N ranks call `newest_of_all`. Raises OtherVersion for a whole one
    that another version of nanoinfra wrote: to take an older one would lose it.
    """
    refused = set()
    while left := [folder for folder in checkpoints(root) if folder not in refused]:
        folder = left[-1]                    # looked for anew: a run may go on there, and let go of old ones
        try:
            verify(folder)
            return folder
        except OtherVersion:
            raise
        except CheckpointError as reason:
            refused.add(folder)
            if folder.exists():
                say(f"refused checkpoint {folder.name}: {reason}")
    return None


def newest_of_all(root: str | Path, axis, say: Say = print) -> Path | None:
    """`newest` as the axis's first rank finds it; the others take its word."""
    def name():
        found = newest(root, say)
        return found and found.name
    found = ask_first(axis, name)
    return Path(root) / found if found else None


def ask_first(axis, work: Callable[[], object]):
    """What `work()` (for JSON) gives on the axis's first rank, on every rank; all raise its ValueError."""
    answer, failure = {}, None
    if axis.rank == 0:
        try:
            answer = {"done": work()}
        except (OSError, ValueError) as error:
            failure, answer = error, {"wrong": _reason(error)}
    answer = comm.gather_objects(answer, axis, "checkpoint")[0]
    if "wrong" in answer:
        raise ValueError(answer["wrong"]) from failure
    return answer["done"]


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
            with disk.naming(folder / file, FileNotFoundError="is gone: the run there has let it go since; "
                                                              "start again, which takes a newer one"):
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


def _prepare(tmp, pairs, rank, say):
    """Rank 0 makes an empty folder; each rank tells what it holds."""
    if rank == 0:
        root = tmp.parent
        if not root.exists():
            root.mkdir(parents=True)
            disk.fsync_folder(root.parent)
        retention.sweep(root, say)
        retention.make_way(tmp, "left")           # what could not be deleted
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


def _publish(tmp, final, body, state, keep, say):
    """Complete the folder, make it durable, give it its name, and only then let old ones go."""
    text = json.dumps(state, indent=1).encode()
    body["files"]["state.json"] = disk.write_file(tmp / "state.json", [text])
    disk.write_file(tmp / "manifest.json", [disk.seal(body)])
    disk.fsync_folder(tmp)
    if os.path.lexists(final):
        retention.set_aside(final, say)           # still a checkpoint, should the next line not run
    os.rename(tmp, final)
    disk.fsync_folder(final.parent)
    retention.prune(final, keep, say)


def _give_up(tmp):
    """Remove what was begun; returns what is left, in words."""
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        good = newest(tmp.parent, say=lambda refused: None)
    except OtherVersion as reason:
        return str(reason)
    left = f"the last good checkpoint is {good}" if good else f"there is no good checkpoint in {tmp.parent}"
    return f"{left}; delete {tmp} by hand" if tmp.exists() else left


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
