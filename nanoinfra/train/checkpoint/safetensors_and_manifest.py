"""The files of a checkpoint: safetensors, and a manifest with which every byte can be checked.

A file is written as a stream (safetensors: 8 bytes for the header's length, a JSON header, raw little-endian
bytes), its SHA-256 taken on the way, then fsynced; no tensor is copied but from a device. The manifest lists
each file's size and SHA-256 and each tensor's shards, and holds the SHA-256 of its own text.
"""
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.model.weights.read_json_files import fsync_path
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError, check_shards_cover_tensor

CHECKPOINT_FORMAT = "nanoinfra checkpoint 1"  # raised with every change of the format
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
                      torch.bfloat16: "BF16",
                      torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def verify_checkpoint(folder: str | Path) -> dict:
    """Read and check every byte of a checkpoint; returns its manifest.

    Raises CheckpointError with the file and what is wrong: it is missing, truncated or altered, or the shards
    do not make up a tensor. A folder without a manifest is one whose save never finished.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, listed in manifest["files"].items():
        check_file_sha256(folder / name, listed)
    for name, entry in manifest["tensors"].items():
        try:
            check_shards_cover_tensor([shard for _, shard in shards_in_files(name, entry)], name,
                                      entry["shape"])
        except CheckpointError as error:
            raise CheckpointError(f"{folder / 'manifest.json'}: {error}") from error
    return manifest


class CheckpointVersionError(CheckpointError):
    """An intact checkpoint that another version of nanoinfra wrote, and that this one cannot read."""


def read_manifest(folder: Path) -> dict:
    """Read manifest.json and check its own SHA-256, not the files it lists.

    Raises CheckpointVersionError when another version of nanoinfra wrote it.
    """
    path = folder / "manifest.json"
    with raise_as_checkpoint_error(path, FileNotFoundError="is missing, so the checkpoint is incomplete"):
        text = path.read_bytes()
    try:
        manifest = json.loads(text)
        written, whole = manifest["format"], serialize_manifest(manifest) == text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: is altered or truncated: {error}") from error
    versions = f"its format is {written!r}, and this version of nanoinfra reads {CHECKPOINT_FORMAT!r}"
    if whole and written != CHECKPOINT_FORMAT:
        raise CheckpointVersionError(f"{path}: {versions}; go on with the version that wrote it, or name "
                                     "another --out")
    if not whole:
        or_other = f", or of another version: {versions}" if written != CHECKPOINT_FORMAT else ""
        raise CheckpointError(f"{path}: is altered: its SHA-256 is not that of its text{or_other}")
    if unknown := {entry["dtype"] for entry in manifest["tensors"].values()} - {*SAFETENSORS_DTYPES.values()}:
        raise CheckpointVersionError(f"{path}: holds tensors of {', '.join(sorted(unknown))}, which this "
                                     f"version of nanoinfra ({CHECKPOINT_FORMAT!r}) does not read; use the "
                                     "version that wrote it")
    return manifest


def serialize_manifest(manifest: dict) -> bytes:
    """Return the canonical text of a manifest; its last entry is the SHA-256 of everything before it."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, indent=1)
    on_one_line = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return on_one_line.encode()


def shards_in_files(name: str, manifest_entry: dict) -> list[tuple[str, TensorShard]]:
    """Return (file, shard) for each shard of the tensor `name`, from its entry in the manifest."""
    full_shape = tuple(manifest_entry["shape"])
    return [(part["file"], TensorShard(name, tuple(part["offset"]), tuple(part["size"]), full_shape))
            for part in manifest_entry["pieces"]]


def check_file_sha256(path: Path, expected: dict) -> None:
    """Raise CheckpointError unless the file has the size and SHA-256 of its entry in the manifest."""
    with raise_as_checkpoint_error(path, FileNotFoundError="is missing"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected["bytes"]:
            word = "truncated" if size < expected["bytes"] else "too long"
            raise CheckpointError(f"{path}: is {word}: {size} bytes where {expected['bytes']} were written")
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{path}: is altered: its SHA-256 is not the one in the manifest")


@contextmanager
def raise_as_checkpoint_error(path: Path, **reasons: str):
    """Turn an OSError inside into a CheckpointError with the file and the reason.

    `reasons` are texts by the name of the exception's class; by default it is the system's own.
    """
    try:
        yield
    except OSError as error:
        reason = reasons.get(type(error).__name__) or error.strerror or error
        raise CheckpointError(f"{path}: {reason}") from error


def write_safetensors(path: Path, pairs: Sequence[tuple[TensorShard, torch.Tensor]]) -> dict:
    """Write shards as a safetensors file; returns and raises as `write_and_fsync_file` does."""
    pairs = sorted(pairs, key=lambda pair: -pair[1].element_size())      # every offset aligned to its dtype
    return write_and_fsync_file(path, _stream(_header(pairs), (tensor for _, tensor in pairs)))


def write_and_fsync_file(path: Path, chunks: Iterable) -> dict:
    """Write `chunks` (buffers of bytes) to a new file and fsync it; returns its {"bytes":, "sha256":}.

    Raises CheckpointError with the file and the system's reason, such as "No space left on device".
    """
    digest, total = hashlib.sha256(), 0
    with raise_as_checkpoint_error(path), open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            write_all_bytes(file, chunk)
            digest.update(chunk)
            total += len(chunk)
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}


def write_all_bytes(file, data) -> None:
    """Write all of `data`; one write call may take only a part, near a full disk or a size limit."""
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def fsync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk, so that new and renamed files survive a crash."""
    with raise_as_checkpoint_error(folder):
        fsync_path(folder)


def safetensors_dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of the tensor's dtype; raises CheckpointError for one that cannot be stored."""
    if tensor.dtype not in SAFETENSORS_DTYPES:
        known = ", ".join(SAFETENSORS_DTYPES.values())
        raise CheckpointError(f"cannot store {tensor.dtype}; cast it to one of {known}")
    return SAFETENSORS_DTYPES[tensor.dtype]


def torch_dtype_of_safetensors_name(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    return next(dtype for dtype, stored in SAFETENSORS_DTYPES.items() if stored == name)


def _header(pairs):
    entries, begin = {}, 0
    for shard, tensor in pairs:
        if tuple(tensor.shape) != shard.size:
            raise CheckpointError(f"{shard.file_key}: a tensor of shape {list(tensor.shape)} is given for a "
                                  f"piece of size {list(shard.size)}")
        end = begin + tensor.numel() * tensor.element_size()
        entries[shard.file_key] = {"dtype": safetensors_dtype_name(tensor), "shape": shard.size,
                                   "data_offsets": [begin, end]}
        begin = end
    if len(entries) != len(pairs):
        raise CheckpointError(f"{len(pairs)} pieces have {len(entries)} different keys: one is given twice")
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _stream(header, tensors):
    yield header
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
