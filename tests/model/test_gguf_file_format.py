"""Broken GGUF files: each is refused in one line, before a number in it has cost memory or time."""
import struct
import time

import gguf
import numpy as np
import pytest
import torch

from nanoinfra.model.weights.gguf.file_format import open_gguf_file
from nanoinfra.model.weights.gguf.load_gguf import open_gguf_weights
from tests.model.gguf_files import add, close, names, write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_model(path, "llama", biases=("q", "k", "v")).read_bytes()


def refused(path, data, message="."):
    """Open it: a ValueError of one line that names the file, soon."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        open_gguf_weights(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert time.process_time() - start < 2
    return str(raised.value)


def header(tensors=0, keys=0, version=3, magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, keys)


def string(raw):
    return struct.pack("<Q", len(raw)) + raw


def test_a_file_is_read_as_the_gguf_package_reads_it(tmp_path, whole):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    got, want = open_gguf_file(path), gguf.GGUFReader(path)
    assert {name: (t.shape, t.quantization_type, t.start_byte, t.nbytes()) for name,
            t in got.tensors.items()} == {
        t.name: (tuple(map(int, t.shape[::-1])), t.tensor_type, t.data_offset, t.n_bytes)
        for t in want.tensors}
    for key, value in got.metadata.items():
        assert np.array_equal(value, want.fields[key].contents()), key
    for t in want.tensors:
        box = tuple(slice(0, size) for size in got.tensors[t.name].shape)
        assert torch.equal(got.dequantize_slices(t.name, box), torch.tensor(t.data))


@pytest.mark.parametrize("data, message", [
    (b"", "cannot be read"),
    (b"GG", "goes on past its end at byte 2"),
    (b"GGUX" + bytes(40), "no GGUF file: it begins with b'GGUX'"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    (header(version=1), "of GGUF version 1, here are 2 and 3"),
    (header(version=4), "of GGUF version 4"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    (header(), "general.architecture is missing"),
    (header(tensors=2 ** 60), "claims 1152921504606846976 tensors, but only 8 bytes follow"),
    (header(keys=2 ** 60), "claims 1152921504606846976 keys"),
    (header(keys=1) + struct.pack("<Q", 2 ** 50) + bytes(99), "goes on past its end"),
    (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 0, 2 ** 62) + bytes(99), "claims .* items of k"),
    (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 8, 2 ** 40) + bytes(99), "claims .* items of k"),
    (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(99), "k has items of type 9"),
    (header(keys=1) + string(b"k") + struct.pack("<I", 77) + bytes(99), "value of k is of type 77"),
    (header(keys=1) + string(b"\xff") + bytes(99), "a key is no UTF-8"),
    (header(keys=2) + 2 * (string(b"k") + struct.pack("<IB", 0, 7)), "the key k is there twice"),
    (header(tensors=1) + string(b"t") + struct.pack("<I", 2 ** 31) + bytes(99), "t has 2147483648 dims"),
], ids=str)
def test_headers_are_refused(tmp_path, data, message):
    refused(tmp_path / "m.gguf", data, message)


def changed(data, name, place, form, value):
    """`data` with a number of a tensor's entry set: at 0 and 8 its dims, at 16 its type, at 20 its offset."""
    at = data.index(string(name)) + 8 + len(name) + 4 + place
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form):]


@pytest.mark.parametrize("place, form, value, message", [
    (0, "<Q", 2 ** 62, "ends at byte .*, the file at .*: the file is cut off"),
    (0, "<Q", 0, "rows that are no blocks"),
    (16, "<I", 77, "token_embd.weight is of type 77, which the installed gguf package cannot"),
    (16, "<I", 24, "of type 24"),            # int8: no weights
    (16, "<I", 12, "ends at byte|rows that are no blocks of 256"),
    (20, "<Q", 2 ** 63, "ends at byte"),
    (20, "<Q", 1 << 14, "begins at byte .* inside another one"),
    (20, "<Q", 3, "off the alignment of 32"),
])
def test_tensors_lie_in_the_file_and_apart(tmp_path, whole, place, form, value, message):
    refused(tmp_path / "m.gguf", changed(whole, b"token_embd.weight", place, form, value), message)


def test_a_file_cut_anywhere_is_refused(tmp_path, whole):
    for length in (*range(0, 700, 23), *range(700, len(whole) - 32, 1999)):
        refused(tmp_path / "m.gguf", whole[:length])


@pytest.mark.prove
def test_a_file_cut_at_any_byte_of_its_header_is_refused(tmp_path, whole):
    start = min(t.start_byte for t in open_gguf_file(_written(tmp_path / "w.gguf", whole)).tensors.values())
    for length in range(start + 64):
        refused(tmp_path / "m.gguf", whole[:length])


@pytest.mark.prove
def test_a_file_with_any_bytes_changed_opens_or_is_refused(tmp_path, whole):
    """Opens: a weight, a name or a token was changed. No traceback, nothing slow."""
    draws, path = np.random.RandomState(5), tmp_path / "m.gguf"
    start = min(t.start_byte for t in open_gguf_file(_written(tmp_path / "w.gguf", whole)).tensors.values())
    opened = 0
    for _ in range(4000):
        data = bytearray(whole)
        for place in draws.randint(0, start, draws.randint(1, 4)):
            data[place] = draws.choice([0, 1, 127, 128, 255, draws.randint(256)])
        try:
            before = time.process_time()
            opened += bool(open_gguf_weights(_written(path, bytes(data))))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        assert time.process_time() - before < 2
    assert 0 < opened < 3000


def test_what_is_no_model_says_so(tmp_path):
    path = tmp_path / "m.gguf"

    def written(architecture="llama", **fields):
        writer = gguf.GGUFWriter(path, architecture)
        add(writer, names(5) | {key.replace("_", ".", 1): value for key, value in fields.items()})
        return close(writer, path).read_bytes()

    refused(path, written(), "a vocabulary and no weights")
    refused(path, written(split_count=3), "one of 3 pieces.*llama-gguf-split --merge")
    refused(path, written(general_type="adapter"), "holds a 'adapter', not a model")
    refused(path, written("mamba"), "'mamba' is unknown; known are gpt2, llama, phi3, qwen2, qwen3")
    with pytest.raises(ValueError, match="there is no file"):
        open_gguf_weights(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        open_gguf_weights(tmp_path / "none.gguf")


def test_an_older_version_and_another_alignment_are_read(tmp_path, whole):
    path = _written(tmp_path / "m.gguf", whole[:4] + struct.pack("<I", 2) + whole[8:])
    want = open_gguf_weights(path).read_parameter("embed.weight")
    path = write_model(tmp_path / "a.gguf", "llama", biases=("q", "k", "v"),
                       general={"general.alignment": 64})
    assert torch.equal(open_gguf_weights(path).read_parameter("embed.weight"), want)


def _written(path, data):
    path.write_bytes(data)
    return path
