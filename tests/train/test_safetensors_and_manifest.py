import errno
import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nanoinfra.formulas.parameters import TensorShard
from nanoinfra.train.checkpoint import safetensors_and_manifest as disk
from nanoinfra.train.checkpoint.tensor_shards import CheckpointError


def mixed():
    """Every dtype we store, odd lengths, a scalar, an empty one, and a strided one."""
    tensors = {str(dtype): (torch.arange(7) % 2).to(dtype) for dtype in disk.SAFETENSORS_DTYPES}
    tensors |= {"scalar": torch.tensor(1.5, dtype=torch.float64), "empty": torch.empty(0, 3),
                "strided": torch.randn(5, 3).T, "grad": torch.randn(3, requires_grad=True)}
    return {TensorShard.of_whole_tensor(name, x.shape): x for name, x in tensors.items()}


def test_another_reader_opens_the_file_and_agrees(tmp_path):
    want = mixed()
    disk.write_safetensors(tmp_path / "rank0.safetensors", list(want.items()))
    got = load_file(tmp_path / "rank0.safetensors")
    assert got.keys() == {piece.file_key for piece in want}
    for piece, x in want.items():
        assert got[piece.file_key].dtype == x.dtype and torch.equal(got[piece.file_key], x)
    with safe_open(tmp_path / "rank0.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_in_the_file(tmp_path):
    disk.write_safetensors(tmp_path / "f", list(mixed().items()))
    text = (tmp_path / "f").read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = json.loads(text[8:8 + length])
    header.pop("__metadata__")
    sizes = {name: dtype.itemsize for dtype, name in disk.SAFETENSORS_DTYPES.items()}
    got = [(8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]] for entry in header.values()]
    assert got == [0] * len(mixed())


def test_tensors_are_written_from_their_own_memory_one_at_a_time(tmp_path, monkeypatch):
    tensors = {TensorShard.of_whole_tensor(str(i), (100 + i,)): torch.randn(100 + i) for i in range(3)}
    seen, write_all = [], disk.write_all_bytes
    monkeypatch.setattr(disk, "write_all_bytes", lambda file,
                        data: (seen.append(data), write_all(file, data)))
    disk.write_safetensors(tmp_path / "f", list(tensors.items()))
    got = [np.frombuffer(data, np.uint8).ctypes.data for data in seen[1:]]
    assert got == [x.data_ptr() for x in tensors.values()]


def test_write_all_goes_on_after_a_short_write():
    class Slow:
        def __init__(self):
            self.got = b""

        def write(self, data):
            self.got += bytes(data[:3])
            return len(data[:3])
    file = Slow()
    disk.write_all_bytes(file, b"0123456789")
    assert file.got == b"0123456789"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_write_all_meets_a_full_disk():
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError) as caught:
        disk.write_all_bytes(full, b"1")
    assert caught.value.errno == errno.ENOSPC


def test_sha_is_of_the_bytes_on_disk(tmp_path):
    listed = disk.write_safetensors(tmp_path / "f", list(mixed().items()))
    disk.check_file_sha256(tmp_path / "f", listed)
    assert listed["bytes"] == (tmp_path / "f").stat().st_size
    with pytest.raises(CheckpointError, match="File exists"):
        disk.write_and_fsync_file(tmp_path / "f", [b""])


def test_wrong_tensors_are_named(tmp_path):
    piece = TensorShard.of_whole_tensor("w", (4, 2)).slice_dim(0, 1, 3)
    with pytest.raises(CheckpointError, match=r"w\[1:3, 0:2\]: a tensor of shape \[4, 2\]"):
        disk.write_safetensors(tmp_path / "a", [(piece, torch.zeros(4, 2))])
    with pytest.raises(CheckpointError, match="given twice"):
        disk.write_safetensors(tmp_path / "b", [(piece, torch.zeros(2, 2))] * 2)
    with pytest.raises(CheckpointError, match="complex64"):
        disk.write_safetensors(tmp_path / "c", [(piece, torch.zeros(2, 2, dtype=torch.complex64))])
    assert list(tmp_path.iterdir()) == []


def test_seal_is_readable_and_the_only_text(tmp_path):
    entry = {"shape": [4, 2], "dtype": "F32", "pieces": [{"file": "f", "offset": [0, 0], "size": [4, 2]}]}
    manifest = {"format": disk.CHECKPOINT_FORMAT, "step": 3, "files": {}, "tensors": {"é [\n 1\n]": entry}}
    text = disk.serialize_manifest(manifest)
    assert b'"shape": [4, 2],\n' in text
    (tmp_path / "manifest.json").write_bytes(text)
    got = disk.read_manifest(tmp_path)
    assert got.pop("sha256") and got == manifest
    edited = text.replace(b'"step": 3', b'"step": 4')
    for other in (edited, text + b"\n", text.replace(b"\n", b" "), b"[]", b"{}", b""):
        (tmp_path / "manifest.json").write_bytes(other)
        with pytest.raises(CheckpointError, match="manifest.json: is altered"):
            disk.read_manifest(tmp_path)
