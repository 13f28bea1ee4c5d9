"""A GGUF file as it lies on the disk: its header's keys and values, and where each tensor's bytes are.

magic, version, two counts; key, type, value each; name, dims, type, offset of each tensor; then the data, at
multiples of the alignment.  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
Every count is held against the bytes that are left before anything is read or kept by it, so a broken header
costs no memory and no time. What block a type has, and its weights, the `gguf` package knows.
"""
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanoinfra.model.weights.import_transformers import optional
from nanoinfra.model.weights.tensor_sources import Box

NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))  # type of a value -> struct's letter
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MAX_DIMS = 4
CUT = "the file is cut off or damaged, fetch it again"
MOST_STRINGS = 2 ** 21                       # in an array: no vocabulary has more tokens or merges


class Stored(NamedTuple):
    """One tensor's bytes in the file; a row is a whole number of blocks, rows follow each other."""
    kind: int                                # gguf.GGMLQuantizationType
    shape: tuple[int, ...]                   # (rows, columns) as torch has it, or (columns,)
    start: int                               # first byte, in the file

    def row_bytes(self) -> int:
        """Bytes of one row."""
        size, nbytes = block_of(self.kind)
        return self.shape[-1] // size * nbytes

    def nbytes(self) -> int:
        """Bytes of all."""
        return prod(self.shape[:-1]) * self.row_bytes()


class GGUFFile(NamedTuple):
    """A GGUF file, opened: `data` is the mapped file."""
    fields: dict[str, object]                # a number, a string, an array of numbers or a list of strings
    tensors: dict[str, Stored]
    data: np.ndarray

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The part `box` of a tensor, float32, dequantised from no more blocks than hold it."""
        import gguf
        tensor = self.tensors[name]
        kind, (size, nbytes) = gguf.GGMLQuantizationType(tensor.kind), block_of(tensor.kind)
        *rows, columns = box
        first = columns.start // size
        blocks = slice(first * nbytes, -(-columns.stop // size) * nbytes)
        stored = self.data[tensor.start:tensor.start + tensor.nbytes()]
        stored = stored.reshape(*tensor.shape[:-1], tensor.row_bytes())
        x = torch.tensor(gguf.dequantize(np.ascontiguousarray(stored[(*rows, blocks)]), kind))
        return x[..., columns.start - first * size:columns.stop - first * size]


def read_gguf(file: str | Path) -> GGUFFile:
    """Open a GGUF file and read its header. Raises ValueError, without the file's name, for a broken one."""
    optional("gguf", "GGUF files")
    try:
        data = np.memmap(file, mode="r")
    except (ValueError, OSError) as error:   # ValueError: it is empty
        raise ValueError(f"it cannot be read: {error}") from error
    header = _Header(data)
    tensor_count, key_count = header.start()
    fields = {}
    for _ in range(key_count):
        key = header.string("a key")
        if key in fields:
            raise ValueError(f"the key {key} is there twice")
        fields[key] = header.value(key, header.number("I"))
    listed = {}
    for _ in range(tensor_count):
        name, *about = header.tensor()
        if name in listed:
            raise ValueError(f"the tensor {name} is there twice")
        listed[name] = about
    return GGUFFile(fields, _placed(listed, header.at, fields.get("general.alignment", 32), len(data)), data)


@lru_cache
def block_of(kind: int) -> tuple[int, int]:
    """(weights, bytes) of a block of this type. ValueError where nobody here can read it."""
    import gguf
    try:
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), gguf.GGMLQuantizationType(kind))
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"of type {kind}, which the installed gguf package cannot dequantise; "
                         "quantise the model anew, for example to Q8_0") from error
    return size, nbytes


class _Header:
    """Reads a header from its first byte on; `at` is the next."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 0       # a memoryview is cut faster than an array

    def take(self, count: int) -> memoryview:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"its header goes on past its end at byte {len(self.data)}: {CUT}")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, form: str):
        """The next number, of a type of `NUMBERS`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def count(self, what: str, least: int, most: int = 2 ** 64) -> int:
        """The next number, a count of things of at least so many bytes each."""
        n, left = self.number("Q"), len(self.data) - self.at
        if n > most or n * least > left:
            raise ValueError(f"it claims {n} {what}, but only {left} bytes follow: {CUT}")
        return n

    def string(self, what: str) -> str:
        """The next string: its length, its bytes."""
        raw = bytes(self.take(self.number("Q")))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8: {raw[:40]!r}") from error

    def start(self) -> tuple[int, int]:
        """(tensors, keys) after magic and version."""
        magic = bytes(self.data[:24])
        if magic.startswith(b"version https://git-l"):
            raise ValueError("it is a Git LFS pointer, not the file itself; run `git lfs pull`")
        if bytes(self.take(4)) != b"GGUF":
            raise ValueError(f"it is no GGUF file: it begins with {magic[:4]!r} where b'GGUF' belongs")
        version = self.number("I")
        if version and version & 0xFFFF == 0:
            raise ValueError("it is a big-endian GGUF file; convert it again for little-endian machines")
        if version not in VERSIONS:
            raise ValueError(f"it is of GGUF version {version}, here are {' and '.join(map(str, VERSIONS))}; "
                             "convert the model again")
        return self.count("tensors", 32), self.count("keys", 13)

    def value(self, key: str, kind: int):
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string(f"the value of {key}")
        if kind != ARRAY:
            raise ValueError(f"the value of {key} is of type {kind}, which no GGUF has")
        item = self.number("I")
        if item == STRING:
            return [self.string(f"an item of {key}")
                    for _ in range(self.count(f"items of {key}", 8, MOST_STRINGS))]
        if item not in NUMBERS:
            raise ValueError(f"the array {key} has items of type {item}, which this reader does not know")
        form = np.dtype("<" + NUMBERS[item])
        return np.frombuffer(self.take(self.count(f"items of {key}", form.itemsize) * form.itemsize), form)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape as torch has it, type, offset)."""
        name, dims = self.string("a tensor's name"), self.number("I")
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f"the tensor {name} has {dims} dims, none has more than {MAX_DIMS}")
        shape = struct.unpack(f"<{dims}Q", self.take(8 * dims))
        return name, shape[::-1], self.number("I"), self.number("Q")


def _placed(listed, end, alignment, size):
    """The tensors with their first bytes: inside the file, each after the one before."""
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    data, free, placed = -(-end // alignment) * alignment, 0, {}
    for name, (shape, kind, offset) in sorted(listed.items(), key=lambda one: one[1][2]):
        try:
            block = block_of(kind)[0]
        except ValueError as error:
            raise ValueError(f"the tensor {name} is {error}") from error
        if shape[-1] % block or not all(shape):
            raise ValueError(f"the tensor {name} of shape {shape} has rows that are no blocks of {block}")
        tensor = Stored(kind, shape, data + offset)
        if offset < free or offset % alignment:
            raise ValueError(f"the tensor {name} begins at byte {offset} of the data, inside another one or "
                             f"off the alignment of {alignment}: {CUT}")
        free = offset + tensor.nbytes()
        if data + free > size:
            raise ValueError(f"the tensor {name} ends at byte {data + free}, the file at {size}: {CUT}")
        placed[name] = tensor
    return {name: placed[name] for name in listed}
