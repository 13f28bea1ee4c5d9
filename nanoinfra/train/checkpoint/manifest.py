"""What a checkpoint is on disk: safetensors files, and a manifest by which every byte can be checked.

A file is written as a stream (safetensors: 8 bytes for the header's length, a JSON header, raw little-endian
bytes), its SHA-256 taken on the way, then fsynced; no tensor is copied but from a device. The manifest lists
each file's size and SHA-256 and each tensor's pieces, and holds the SHA-256 of its own text.
"""
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nanoinfra.model.weights.json_files import sync
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError, Piece, check_cover

FORMAT = "nanoinfra checkpoint 1"            # of another version another one, sealed as this one is
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def verify(folder: str | Path) -> dict:
    """Read and check every byte of a checkpoint; returns its manifest.

    Raises CheckpointError naming the file and what is wrong: missing, truncated, altered, or its pieces do
    not make up a tensor. A folder without a manifest is one whose save never finished.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, listed in manifest["files"].items():
        check_file(folder / name, listed)
    for name, entry in manifest["tensors"].items():
        try:
            check_cover([piece for _, piece in sources(name, entry)], name, entry["shape"])
        except CheckpointError as error:
            raise CheckpointError(f"{folder / 'manifest.json'}: {error}") from error
    return manifest


class OtherVersion(CheckpointError):
    """A checkpoint, whole, that another version of nanoinfra wrote and can read."""


def read_manifest(folder: Path) -> dict:
    """The manifest, itself checked; the files it lists are not. Raises OtherVersion where it is not ours."""
    path = folder / "manifest.json"
    with naming(path, FileNotFoundError="is missing, so the checkpoint is incomplete"):
        text = path.read_bytes()
    try:
        manifest = json.loads(text)
        written, whole = manifest["format"], seal(manifest) == text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path}: is altered or truncated: {error}") from error
    versions = f"its format is {written!r}, and this version of nanoinfra reads {FORMAT!r}"
    if whole and written != FORMAT:
        raise OtherVersion(f"{path}: {versions}; go on with the version that wrote it, or name another --out")
    if not whole:
        or_other = f", or of another version: {versions}" if written != FORMAT else ""
        raise CheckpointError(f"{path}: is altered: its SHA-256 is not that of its text{or_other}")
    if unknown := {entry["dtype"] for entry in manifest["tensors"].values()} - {*DTYPES.values()}:
        raise OtherVersion(f"{path}: holds tensors of {', '.join(sorted(unknown))}, which this version of "
                           f"nanoinfra ({FORMAT!r}) does not read; use the version that wrote it")
    return manifest


def seal(manifest: dict) -> bytes:
    """The only text that may stand for this manifest, with the SHA-256 of all the rest as its last entry."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    text = json.dumps({**body, "sha256": digest}, indent=1)
    on_one_line = re.sub(r"\[\n\s+([\d,\s]+?)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return on_one_line.encode()


def sources(name: str, entry: dict) -> list[tuple[str, Piece]]:
    """(file, piece) of each part of a tensor, from the manifest's entry for it."""
    full = tuple(entry["shape"])
    return [(part["file"], Piece(name, tuple(part["offset"]), tuple(part["size"]), full))
            for part in entry["pieces"]]


def check_file(path: Path, listed: dict) -> None:
    """Raise CheckpointError unless the file has the listed size and SHA-256."""
    with naming(path, FileNotFoundError="is missing"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != listed["bytes"]:
            word = "truncated" if size < listed["bytes"] else "too long"
            raise CheckpointError(f"{path}: is {word}: {size} bytes where {listed['bytes']} were written")
        if hashlib.file_digest(file, "sha256").hexdigest() != listed["sha256"]:
            raise CheckpointError(f"{path}: is altered: its SHA-256 is not the one in the manifest")


@contextmanager
def naming(path: Path, **reasons: str):
    """Turn a system error into a CheckpointError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        reason = reasons.get(type(error).__name__) or error.strerror or error
        raise CheckpointError(f"{path}: {reason}") from error


def write_tensors(path: Path, pairs: Sequence[tuple[Piece, torch.Tensor]]) -> dict:
    """Write pieces as a safetensors file; returns and raises as `write_file` does."""
    pairs = sorted(pairs, key=lambda pair: -pair[1].element_size())      # every offset aligned to its dtype
    return write_file(path, _stream(_header(pairs), (tensor for _, tensor in pairs)))


def write_file(path: Path, chunks: Iterable) -> dict:
    """Write `chunks` (buffers of bytes) to a new file and fsync it; returns the {"bytes", "sha256"} meant.

    Raises CheckpointError with the file and the system's reason, such as "No space left on device".
    """
    digest, total = hashlib.sha256(), 0
    with naming(path), open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            write_all(file, chunk)
            digest.update(chunk)
            total += len(chunk)
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}


def write_all(file, data) -> None:
    """Write all of `data`: near a full disk or a size limit the system may take only a part at first."""
    view = memoryview(data)
    while view:
        view = view[file.write(view):]


def fsync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    with naming(folder):
        sync(folder)


def dtype_name(tensor: torch.Tensor) -> str:
    """The safetensors name of its dtype; raises CheckpointError for one that is not stored."""
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"cannot store {tensor.dtype}; cast it to one of {', '.join(DTYPES.values())}")
    return DTYPES[tensor.dtype]


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    return next(dtype for dtype, stored in DTYPES.items() if stored == name)


def _header(pairs):
    entries, begin = {}, 0
    for piece, tensor in pairs:
        if tuple(tensor.shape) != piece.size:
            raise CheckpointError(f"{piece.key}: a tensor of shape {list(tensor.shape)} is given for a "
                                  f"piece of size {list(piece.size)}")
        end = begin + tensor.numel() * tensor.element_size()
        entries[piece.key] = {"dtype": dtype_name(tensor), "shape": piece.size, "data_offsets": [begin, end]}
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
