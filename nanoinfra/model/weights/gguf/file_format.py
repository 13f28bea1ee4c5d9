"""The GGUF file format: the metadata of its header, and where each tensor's bytes are.

A file has magic, version and two counts; key, type and value of each metadata entry; name, dims, type and
offset of each tensor; then the data, aligned.  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Every count is compared with the bytes that follow before anything is allocated for it, so that a damaged
header costs no memory and no time. The `gguf` package knows the blocks of each quantization type.
"""
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanoinfra.model.weights.call_transformers import import_optional_package
from nanoinfra.model.weights.map_parameters_to_stored_tensors import TensorSlices

_NUMBER_FORMATS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))   # type -> struct's letter
_STRING_TYPE, _ARRAY_TYPE = 8, 9
SUPPORTED_GGUF_VERSIONS = (2, 3)
_MAX_DIMS = 4
DAMAGED_FILE_HINT = "the file is cut off or damaged, fetch it again"
_MAX_ARRAY_STRINGS = 2 ** 21                       # no vocabulary has more tokens or merges


class StoredTensor(NamedTuple):
    """Where one tensor's bytes are in the file. A row is a whole number of blocks; rows follow each other."""
    quantization_type: int                   # gguf.GGMLQuantizationType
    shape: tuple[int, ...]                   # (rows, columns) as torch has it, or (columns,)
    start_byte: int                          # in the file

    def row_bytes(self) -> int:
        """The stored bytes of one row."""
        size, nbytes = quantization_block(self.quantization_type)
        return self.shape[-1] // size * nbytes

    def nbytes(self) -> int:
        """The stored bytes of the whole tensor."""
        return prod(self.shape[:-1]) * self.row_bytes()


class GGUFFile(NamedTuple):
    """An open GGUF file, memory-mapped."""
    metadata: dict[str, object]              # a number, a string, an array of numbers or a list of strings
    tensors: dict[str, StoredTensor]
    mapped_bytes: np.ndarray

    def dequantize_slices(self, name: str, slices: TensorSlices) -> torch.Tensor:
        """A part of a tensor as float32, dequantized from no more blocks than hold it."""
        import gguf
        tensor = self.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.quantization_type)
        size, nbytes = quantization_block(tensor.quantization_type)
        *rows, columns = slices
        first = columns.start // size
        blocks = slice(first * nbytes, -(-columns.stop // size) * nbytes)
        stored = self.mapped_bytes[tensor.start_byte:tensor.start_byte + tensor.nbytes()]
        stored = stored.reshape(*tensor.shape[:-1], tensor.row_bytes())
        x = torch.tensor(gguf.dequantize(np.ascontiguousarray(stored[(*rows, blocks)]), kind))
        return x[..., columns.start - first * size:columns.stop - first * size]


def open_gguf_file(file: str | Path) -> GGUFFile:
    """Open a GGUF file and read its header. Raises ValueError, without the file's name, if it is damaged."""
    import_optional_package("gguf", "GGUF files")
    try:
        data = np.memmap(file, mode="r")
    except (ValueError, OSError) as error:   # an empty file raises ValueError
        raise ValueError(f"it cannot be read: {error}") from error
    header = _Header(data)
    tensor_count, key_count = header.start()
    metadata = {}
    for _ in range(key_count):
        key = header.string("a key")
        if key in metadata:
            raise ValueError(f"the key {key} is there twice")
        metadata[key] = header.value(key, header.number("I"))
    listed = {}
    for _ in range(tensor_count):
        name, *about = header.tensor()
        if name in listed:
            raise ValueError(f"the tensor {name} is there twice")
        listed[name] = about
    alignment = metadata.get("general.alignment", 32)
    return GGUFFile(metadata, _placed(listed, header.at, alignment, len(data)), data)


@lru_cache
def quantization_block(quantization_type: int) -> tuple[int, int]:
    """(weights, bytes) of one block of a quantization type. Raises ValueError if it cannot be dequantized."""
    import gguf
    try:
        kind = gguf.GGMLQuantizationType(quantization_type)
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"of type {quantization_type}, which the installed gguf package cannot dequantise; "
                         "quantise the model anew, for example to Q8_0") from error
    return size, nbytes


class _Header:
    """Reads a header from its first byte on; `at` is the offset of the next byte."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 0       # slicing a memoryview is faster than an array

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"its header goes on past its end at byte {len(self.data)}: {DAMAGED_FILE_HINT}")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, form: str):
        """The next number, whose type has the struct letter `form`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, what: str, least: int, most: int = 2 ** 64) -> int:
        """The next number, a count of things that take at least `least` bytes each."""
        n, left = self.number("Q"), len(self.data) - self.at
        if n > most or n * least > left:
            raise ValueError(f"it claims {n} {what}, but only {left} bytes follow: {DAMAGED_FILE_HINT}")
        return n

    def string(self, what: str) -> str:
        """The next string: a length and UTF-8 bytes."""
        raw = bytes(self.take(self.number("Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8: {raw[:40]!r}") from error

    def start(self) -> tuple[int, int]:
        """Check magic and version; return the counts (tensors, keys)."""
        magic = bytes(self.data[:24])
        if magic.startswith(b"version https://git-l"):
            raise ValueError("it is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if bytes(self.take(4)) != b"GGUF":
            raise ValueError(f"it is no GGUF file: it begins with {magic[:4]!r} where b'GGUF' belongs")
        version = self.number("I")
        if version and version & 0xFFFF == 0:
            raise ValueError("it is a big-endian GGUF file; convert it again for little-endian machines")
        if version not in SUPPORTED_GGUF_VERSIONS:
            supported = " and ".join(map(str, SUPPORTED_GGUF_VERSIONS))
            raise ValueError(f"it is of GGUF version {version}, here are {supported}; "
                             "convert the model again")
        return self.count("tensors", 32), self.count("keys", 13)

    def value(self, key: str, kind: int):
        if kind in _NUMBER_FORMATS:
            return self.number(_NUMBER_FORMATS[kind])
        if kind == _STRING_TYPE:
            return self.string(f"the value of {key}")
        if kind != _ARRAY_TYPE:
            raise ValueError(f"the value of {key} is of type {kind}, which no GGUF has")
        item = self.number("I")
        if item == _STRING_TYPE:
            return [self.string(f"an item of {key}")
                    for _ in range(self.count(f"items of {key}", 8, _MAX_ARRAY_STRINGS))]
        if item not in _NUMBER_FORMATS:
            raise ValueError(f"the array {key} has items of type {item}, which this reader does not know")
        form = np.dtype("<" + _NUMBER_FORMATS[item])
        return np.frombuffer(self.take(self.count(f"items of {key}", form.itemsize) * form.itemsize), form)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape in torch's order, type, offset) of the next tensor."""
        name, dims = self.string("a tensor's name"), self.number("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"the tensor {name} has {dims} dims, none has more than {_MAX_DIMS}")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims))
        return name, shape[::-1], self.number("I"), self.number("Q")


def _placed(listed, end, alignment, size):
    """The tensors with their first bytes; checked to lie inside the file, each after the one before."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    data, free, placed = -(-end // alignment) * alignment, 0, {}
    for name, (shape, kind, offset) in sorted(listed.items(), key=lambda one: one[1][2]):
        try:
            block = quantization_block(kind)[0]
        except ValueError as error:
            raise ValueError(f"the tensor {name} is {error}") from error
        if shape[-1] % block or not all(shape):
            raise ValueError(f"the tensor {name} of shape {shape} has rows that are no blocks of {block}")
        tensor = StoredTensor(kind, shape, data + offset)
        if offset < free or offset % alignment:
            raise ValueError(f"the tensor {name} begins at byte {offset} of the data, inside another one or "
                             f"off the alignment of {alignment}: {DAMAGED_FILE_HINT}")
        free = offset + tensor.nbytes()
        if data + free > size:
            raise ValueError(f"the tensor {name} ends at byte {data + free}, the file at {size}: "
                             f"{DAMAGED_FILE_HINT}")
        placed[name] = tensor
    return {name: placed[name] for name in listed}
