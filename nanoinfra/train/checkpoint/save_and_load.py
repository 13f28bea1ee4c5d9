"""Distributed checkpoints: resharded on load to any mesh, and usable after a crash at any byte of a save.

A checkpoint is the folder step_00000012: each rank's shards in rank{r}.safetensors, state.json, and, written
last, manifest.json. All files are written to step_00000012.tmp, fsynced and renamed; `verify_checkpoint`
(train/checkpoint/safetensors_and_manifest.py) checks every byte. Of equal shards only the first rank's is
written. Nothing is pickled. Works with every parallelism through `TensorShard` (formulas/parameters.py);
ranks on several hosts need a folder that all of them see.
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
from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.train.checkpoint import list_and_delete_checkpoints
from nanoinfra.train.checkpoint import safetensors_and_manifest as disk
from nanoinfra.train.checkpoint.list_and_delete_checkpoints import (
    WarnFunction,
    checkpoint_folder,
    list_checkpoints,
)
from nanoinfra.train.checkpoint.safetensors_and_manifest import CheckpointVersionError, verify_checkpoint
from nanoinfra.train.checkpoint.tensor_shards import (
    CheckpointError,
    check_shards_cover_tensor,
    fill_from_stored_shards,
)

_ShardTensors = Mapping[TensorShard, torch.Tensor] | Iterable[tuple[TensorShard, torch.Tensor]]


def save_checkpoint(root: str | Path, step: int, tensors: _ShardTensors, state: dict, axis, keep: int = 2,
                    warn: WarnFunction = print) -> Path:
    """Save each rank's shards and rank 0's `state` (for JSON) in the folder `root`/step_{step}; returns it.

    Every rank of `axis` calls it. Afterwards the newest `keep` checkpoints up to this step remain; `warn`
    gets a line on each older one that cannot be deleted. When any rank fails, all ranks raise one
    CheckpointError, the unfinished folder is removed, and older checkpoints stay untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just saved; keep at least 1")
    final = checkpoint_folder(root, step)
    tmp, own_file = final.with_suffix(".tmp"), f"rank{axis.rank}.safetensors"
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    try:
        entries = _assign_shards_to_files(_on_all_ranks(axis, lambda: _prepare(tmp, pairs, axis.rank, warn)))
        mine = [pair for pair in pairs if (own_file, pair[0])
                in disk.shards_in_files(pair[0].name, entries[pair[0].name])]
        written = _on_all_ranks(axis, lambda: disk.write_safetensors(tmp / own_file, mine))
        files = {f"rank{rank}.safetensors": listed for rank, listed in enumerate(written)}
        body = {"format": disk.CHECKPOINT_FORMAT, "step": step, "files": files, "tensors": entries}
        _on_all_ranks(axis, lambda: axis.rank == 0 and _commit(tmp, final, body, state, keep, warn))
    except CheckpointError as failure:
        left = _on_all_ranks(axis, lambda: axis.rank == 0 and _remove_unfinished(tmp))[0]
        raise CheckpointError(f"cannot save step {step}: {failure}; {left}") from failure
    return final


def find_newest_checkpoint(root: str | Path, warn: WarnFunction = print) -> Path | None:
    """Return the newest checkpoint in `root` that verifies, or None; `warn` gets a line on each refused one.

    Reads every byte of what it tries: on N ranks call `find_newest_checkpoint_on_all_ranks`. Raises
    CheckpointVersionError for an intact one that another version wrote, as taking an older one would lose it.
    """
    refused = set()
    while left := [folder for folder in list_checkpoints(root) if folder not in refused]:
        folder = left[-1]                    # listed again each time: a run may be writing there now
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointVersionError:
            raise
        except CheckpointError as reason:
            refused.add(folder)
            if folder.exists():
                warn(f"refused checkpoint {folder.name}: {reason}")
    return None


def find_newest_checkpoint_on_all_ranks(root: str | Path, axis, warn: WarnFunction = print) -> Path | None:
    """Return what `find_newest_checkpoint` finds on the axis's first rank, on every rank of the axis."""
    def name():
        found = find_newest_checkpoint(root, warn)
        return found and found.name
    found = run_on_first_rank(axis, name)
    return Path(root) / found if found else None


def run_on_first_rank(axis, work: Callable[[], object]):
    """Return, on every rank, what `work()` returns on the axis's first rank (for JSON).

    When `work` raises OSError or ValueError there, every rank raises ValueError with its message.
    """
    answer, failure = {}, None
    if axis.rank == 0:
        try:
            answer = {"done": work()}
        except (OSError, ValueError) as error:
            failure, answer = error, {"wrong": _reason(error)}
    answer = comm.all_gather_json(answer, axis, "checkpoint")[0]
    if "wrong" in answer:
        raise ValueError(answer["wrong"]) from failure
    return answer["done"]


def load_shards(folder: str | Path, wanted: Iterable[TensorShard],
                manifest: dict | None = None) -> Iterator[tuple[TensorShard, torch.Tensor]]:
    """Yield each wanted shard with its tensor (on the CPU, in the stored dtype), reading only its own ranges.

    `manifest` is what `verify_checkpoint(folder)` returned, here or on another rank; by default it is called.
    The shards may be cut otherwise than those saved (resharding). Raises CheckpointError for a tensor that is
    not in the checkpoint or has another full shape there.
    """
    folder = Path(folder)
    entries = (manifest or verify_checkpoint(folder))["tensors"]
    with ExitStack() as stack:
        @functools.cache
        def opened(file):
            gone = "is gone: the run there has let it go since; start again, which takes a newer one"
            with disk.raise_as_checkpoint_error(folder / file, FileNotFoundError=gone):
                return stack.enter_context(safe_open(folder / file, framework="pt"))
        for shard in wanted:
            yield shard, _read(shard, _entry(shard, entries, folder), opened)


def read_checkpoint_state(folder: str | Path) -> dict:
    """Return the `state` that was given to `save_checkpoint`, checked against the manifest."""
    path = Path(folder) / "state.json"
    disk.check_file_sha256(path, disk.read_manifest(path.parent)["files"][path.name])
    return json.loads(path.read_bytes())


def _on_all_ranks(axis, work):
    """Return every rank's result of `work()` on every rank; when any of them fails, all raise."""
    failure = None
    try:
        mine = {"done": work()}
    except (OSError, ValueError, TypeError) as error:
        failure, mine = error, {"failed": _reason(error)}
    results = comm.all_gather_json(mine, axis, "checkpoint")
    failed = [f"rank {rank}: {result['failed']}" for rank, result in enumerate(results) if "failed" in result]
    if failed:
        more = f" (and {len(failed) - 1} more of {axis.size} ranks)" if failed[1:] else ""
        raise CheckpointError(failed[0] + more) from failure
    return [result["done"] for result in results]


def _reason(error):
    named = isinstance(error, OSError) and error.filename
    return f"{error.filename}: {error.strerror}" if named else str(error)


def _prepare(tmp, pairs, rank, warn):
    """Rank 0 makes an empty folder; each rank returns what shards it holds."""
    if rank == 0:
        root = tmp.parent
        if not root.exists():
            root.mkdir(parents=True)
            disk.fsync_folder(root.parent)
        list_and_delete_checkpoints.delete_unfinished_checkpoints(root, warn)
        list_and_delete_checkpoints.rename_out_of_the_way(tmp, "left")           # what could not be deleted
        tmp.mkdir()
    return [[piece.name, piece.offset, piece.size, piece.full_shape, disk.safetensors_dtype_name(x)]
            for piece, x in pairs]


def _assign_shards_to_files(held):
    """The manifest's entry of each tensor; the first rank that holds a shard writes it."""
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
        check_shards_cover_tensor([piece for _, piece in disk.shards_in_files(name, entry)], name,
                                  entry["shape"])
    return entries


def _commit(tmp, final, body, state, keep, warn):
    """Write state and manifest, fsync, rename the folder to its final name, and then delete old ones."""
    text = json.dumps(state, indent=1).encode()
    body["files"]["state.json"] = disk.write_and_fsync_file(tmp / "state.json", [text])
    disk.write_and_fsync_file(tmp / "manifest.json", [disk.serialize_manifest(body)])
    disk.fsync_folder(tmp)
    if os.path.lexists(final):
        # It stays a checkpoint, in case that the next line does not run.
        list_and_delete_checkpoints.set_aside_for_second_save(final, warn)
    os.rename(tmp, final)
    disk.fsync_folder(final.parent)
    list_and_delete_checkpoints.delete_old_checkpoints(final, keep, warn)


def _remove_unfinished(tmp):
    """Remove the unfinished folder; returns, in words, which checkpoint is left."""
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        good = find_newest_checkpoint(tmp.parent, warn=lambda refused: None)
    except CheckpointVersionError as reason:
        return str(reason)
    left = f"the last good checkpoint is {good}" if good else f"there is no good checkpoint in {tmp.parent}"
    return f"{left}; delete {tmp} by hand" if tmp.exists() else left


def _entry(piece, entries, folder):
    entry = entries.get(piece.name)
    if entry is None:
        raise CheckpointError(f"{folder}: has no tensor {piece.name!r} among its {len(entries)}")
    if tuple(entry["shape"]) != piece.full_shape:
        raise CheckpointError(f"{folder}: tensor {piece.name!r} has shape {entry['shape']}, not the wanted "
                              f"{list(piece.full_shape)}")
    return entry


def _read(piece, entry, opened):
    out = torch.empty(piece.size, dtype=disk.torch_dtype_of_safetensors_name(entry["dtype"]))
    stored = ((shard, lambda file=file, key=shard.file_key: opened(file).get_slice(key))
              for file, shard in disk.shards_in_files(piece.name, entry))
    fill_from_stored_shards(out, piece, stored)
    return out
