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
from nanoinfra.train.checkpoint.manifest import CheckpointVersionError, verify_checkpoint
from nanoinfra.train.checkpoint.retention import WarnFunction, checkpoint_folder, list_checkpoints
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError, TensorShard, check_shards_cover_tensor

_ShardTensors = Mapping[TensorShard, torch.Tensor] | Iterable[tuple[TensorShard, torch.Tensor]]


def save_checkpoint(root: str | Path, step: int, tensors: _ShardTensors, state: dict, axis, keep: int = 2,
                    say: WarnFunction = print) -> Path:
    """Save each rank's pieces and rank 0's `state` (for JSON) in the folder `root`/step_{step}; returns it.

    Every rank of `axis` calls it. Afterwards the newest `keep` checkpoints up to this step remain; `say` is
    told what of the others cannot be deleted. Where any rank fails, all raise one CheckpointError; the
    unfinished is removed, what was there before is untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete the checkpoint just saved; keep at least 1")
    final = checkpoint_folder(root, step)
    tmp, me = final.with_suffix(".tmp"), f"rank{axis.rank}.safetensors"
    pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    try:
        entries = _deal(_together(axis, lambda: _prepare(tmp, pairs, axis.rank, say)))
        mine = [pair for pair in pairs if (me, pair[0])
                in disk.shards_in_files(pair[0].name, entries[pair[0].name])]
        written = _together(axis, lambda: disk.write_safetensors(tmp / me, mine))
        files = {f"rank{rank}.safetensors": listed for rank, listed in enumerate(written)}
        body = {"format": disk.CHECKPOINT_FORMAT, "step": step, "files": files, "tensors": entries}
        _together(axis, lambda: axis.rank == 0 and _publish(tmp, final, body, state, keep, say))
    except CheckpointError as failure:
        left = _together(axis, lambda: axis.rank == 0 and _give_up(tmp))[0]
        raise CheckpointError(f"cannot save step {step}: {failure}; {left}") from failure
    return final


def find_newest_checkpoint(root: str | Path, say: WarnFunction = print) -> Path | None:
    """The newest checkpoint in `root` that verifies, or None; `say` is told each one refused, and why.

    Reads every byte of what it tries: on N ranks call `newest_of_all`. Raises OtherVersion for a whole one
    that another version of nanoinfra wrote: to take an older one would lose it.
    """
    refused = set()
    while left := [folder for folder in list_checkpoints(root) if folder not in refused]:
        folder = left[-1]                    # looked for anew: a run may go on there, and let go of old ones
        try:
            verify_checkpoint(folder)
            return folder
        except CheckpointVersionError:
            raise
        except CheckpointError as reason:
            refused.add(folder)
            if folder.exists():
                say(f"refused checkpoint {folder.name}: {reason}")
    return None


def find_newest_checkpoint_on_all_ranks(root: str | Path, axis, say: WarnFunction = print) -> Path | None:
    """`newest` as the axis's first rank finds it; the others take its word."""
    def name():
        found = find_newest_checkpoint(root, say)
        return found and found.name
    found = run_on_first_rank(axis, name)
    return Path(root) / found if found else None


def run_on_first_rank(axis, work: Callable[[], object]):
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


def load_shards(folder: str | Path, wanted: Iterable[TensorShard],
                verified: dict | None = None) -> Iterator[tuple[TensorShard, torch.Tensor]]:
    """Yield each wanted piece with its tensor (CPU, of the stored dtype), reading only the ranges it needs.

    `verified` is what `verify(folder)` returned, here or on another rank; without it this verifies first.
    Raises CheckpointError for a name that is not there, or one whose full shape is another.
    """
    folder = Path(folder)
    entries = (verified or verify_checkpoint(folder))["tensors"]
    with ExitStack() as stack:
        @functools.cache
        def opened(file):
            with disk.raise_as_checkpoint_error(folder / file,
                                                FileNotFoundError="is gone: the run there has let it go since; "
                                                "start again, which takes a newer one"):
                return stack.enter_context(safe_open(folder / file, framework="pt"))
        for piece in wanted:
            yield piece, _read(piece, _entry(piece, entries, folder), opened)


def catalog(folder: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (full shape, dtype)} of every tensor in the checkpoint."""
    entries = disk.read_manifest(Path(folder))["tensors"]
    return {name: (tuple(entry["shape"]), disk.torch_dtype_from_name(entry["dtype"])) for name, entry
            in entries.items()}


def read_checkpoint_state(folder: str | Path) -> dict:
    """The `state` given to `save`, checked against the manifest."""
    path = Path(folder) / "state.json"
    disk.check_file_sha256(path, disk.read_manifest(path.parent)["files"][path.name])
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
        retention.delete_unfinished_checkpoints(root, say)
        retention.rename_out_of_the_way(tmp, "left")           # what could not be deleted
        tmp.mkdir()
    return [[piece.name, piece.offset, piece.size, piece.full_shape, disk.safetensors_dtype_name(x)]
            for piece, x in pairs]


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
        check_shards_cover_tensor([piece for _, piece in disk.shards_in_files(name, entry)], name,
                                  entry["shape"])
    return entries


def _publish(tmp, final, body, state, keep, say):
    """Complete the folder, make it durable, give it its name, and only then let old ones go."""
    text = json.dumps(state, indent=1).encode()
    body["files"]["state.json"] = disk.write_and_fsync_file(tmp / "state.json", [text])
    disk.write_and_fsync_file(tmp / "manifest.json", [disk.serialize_manifest(body)])
    disk.fsync_folder(tmp)
    if os.path.lexists(final):
        retention.set_aside_for_second_save(final, say)  # still a checkpoint, should the next line not run
    os.rename(tmp, final)
    disk.fsync_folder(final.parent)
    retention.delete_old_checkpoints(final, keep, say)


def _give_up(tmp):
    """Remove what was begun; returns what is left, in words."""
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        good = find_newest_checkpoint(tmp.parent, say=lambda refused: None)
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
    out = torch.empty(piece.size, dtype=disk.torch_dtype_from_name(entry["dtype"]))
    for file, source in disk.shards_in_files(piece.name, entry):
        common = piece.intersect(source)
        if common:
            out[common.slices_within(piece)] = opened(file).get_slice(source.file_key)[common.slices_within(source)]
    return out
