"""Folders broken in every way: one line that names the file."""
import json
import os
import shutil

import pytest

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.model.weights.read_json_files import MAX_JSON_BYTES, read_json
from nanoinfra.model.weights.safetensors_files import SAFETENSORS_FILE, SAFETENSORS_INDEX_FILE
from tests.model.test_decoder import config
from tests.model.twins import scrambled

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "m"
    save_hf_model(scrambled(Decoder(config("llama"))), path, shard_bytes=12_000)
    return path


def index(change):
    def broken(folder):
        path = folder / SAFETENSORS_INDEX_FILE
        got = json.loads(path.read_text())
        path.write_text(json.dumps(change(got) or got))
    return broken


def moved(name):
    def change(got):
        first = min(got["weight_map"])
        got["weight_map"][first] = name
    return index(change)


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def directory(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


SHARD = "model-00002-of-"
BROKEN = {
    "config is a pointer": (written("config.json", POINTER.encode()), "config.json is a Git LFS pointer"),
    "index is a pointer": (written(SAFETENSORS_INDEX_FILE, POINTER.encode()),
                           "index.json is a Git LFS pointer"),
    "shard is a pointer": (lambda f: shard(f).write_text(POINTER), f"{SHARD}.* is a Git LFS pointer"),
    "config is a folder": (directory, "config.json is not a file"),
    "config is binary": (written("config.json", b"\xff\xfe\x00"), "config.json is no text in UTF-8"),
    "config is cut": (written("config.json", b'{"model_type": "lla'), "config.json is not valid JSON"),
    "config is a list": (written("config.json", b"[1]"), "config.json holds a list where a JSON object"),
    "config is empty": (written("config.json", b""), "config.json is not valid JSON"),
    "config nests": (written("config.json", b'{"a":' * 99_999), "config.json is not valid JSON: .* deep"),
    "config has a monster": (written("config.json", b'{"a": ' + b"9" * 9999 + b"}"), "config.json .* digits"),
    "no map": (index(lambda got: {"metadata": {}}), "index.json has no weight_map from names of tensors"),
    "a list for a map": (index(lambda got: {"weight_map": ["a"]}), "index.json has no weight_map"),
    "numbers for names": (moved(7), "index.json has no weight_map"),
    "out of the folder": (moved("../m/model.safetensors"), "lists '../m/model.safetensors', which is no saf"),
    "elsewhere": (moved("/etc/passwd"), "lists '/etc/passwd', which is no safetensors file of its folder"),
    "no safetensors": (moved("pytorch_model.bin"), "lists 'pytorch_model.bin', which is no safetensors file"),
    "absent": (moved("model-9.safetensors"), "lists model-9.safetensors, which is not in the folder"),
    "empty shard": (lambda f: shard(f).write_bytes(b""), f"{SHARD}.* cannot be read as safetensors"),
    "an adapter": (written("adapter_config.json", b"{}"), "adapter_config.json says that an adapter"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("model*")],
                   f"holds neither {SAFETENSORS_FILE} nor"),
}


def shard(folder):
    return next(folder.glob(f"{SHARD}*"))


@pytest.mark.parametrize("how, message", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named_in_a_line(tmp_path, folder, how, message):
    shutil.copytree(folder, tmp_path / "m")
    how(tmp_path / "m")
    with pytest.raises(ValueError, match=message) as caught:
        load_hf_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_json_that_is_absent_is_empty_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    assert read_json(tmp_path / "config.json") == {}
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="large.json has 67108865 bytes, too many"):
        read_json(path)
    (tmp_path / "good.json").write_text("{}")

    def denied(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.read_bytes", denied)
    with pytest.raises(ValueError, match="good.json cannot be read: Permission denied"):
        read_json(tmp_path / "good.json")
