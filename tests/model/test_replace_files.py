import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import load_hf_model, save_hf_model
from nanoinfra.model.weights.replace_files import replace_model_files
from nanoinfra.model.weights.safetensors_files import SAFETENSORS_FILE, SAFETENSORS_INDEX_FILE
from tests.model.test_decoder import config
from tests.model.twins import difference, scrambled


@pytest.fixture(scope="module")
def models():
    return [scrambled(Decoder(config("llama", tied)), seed) for seed, tied in ((1, True), (2, False))]


def same(folder, model):
    loaded = load_hf_model(folder)
    return loaded.config == model.config and all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("sizes", [(2**30, 12_000), (12_000, 2**30), (9_000, 20_000)])
def test_of_an_earlier_export_nothing_stays(tmp_path, models, sizes):
    for model, size in zip(models, sizes):
        save_hf_model(model, tmp_path, shard_bytes=size)
        assert same(tmp_path, model) and (tmp_path / SAFETENSORS_INDEX_FILE).exists() == (size < 2**30)
        other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert difference(model, other) <= 1e-4
    assert (tmp_path / SAFETENSORS_FILE).exists() != (tmp_path / SAFETENSORS_INDEX_FILE).exists()
    assert not (tmp_path / ".new").exists()


@pytest.mark.parametrize("sizes", [(2**30, 12_000), (12_000, 2**30)])
def test_an_export_that_is_cut_off_leaves_the_old_model_or_none(tmp_path, models, monkeypatch, sizes):
    """At every call that changes the folder, in turn; a stopped process runs no clean-up either."""
    calls = []                                                   # that may still be made
    for owner, name in ((os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), calls))
    for allowed in range(99):
        folder = tmp_path / str(allowed)
        calls[:] = [None] * 99
        save_hf_model(models[0], folder, shard_bytes=sizes[0])
        calls[:] = [None] * allowed
        try:
            save_hf_model(models[1], folder, shard_bytes=sizes[1])
        except Stopped:
            assert state_of(folder, models) == ("none" if allowed else "old")
            calls[:] = [None] * 99
            (folder / ".new").mkdir()                            # no clean-up runs after SIGKILL
            (folder / ".new" / "model-00009-of-00009.safetensors").touch()
            save_hf_model(models[1], folder, shard_bytes=sizes[1])
            assert same(folder, models[1])
        else:
            assert same(folder, models[1]) and allowed > 9
            return
    raise AssertionError("it never ended")


class Stopped(BaseException):
    """As SIGKILL: no handler of errors sees it."""


def counted(call, calls):
    def stopped(*args, **options):
        if not calls:
            raise Stopped
        calls.pop()
        return call(*args, **options)
    return stopped


def state_of(folder, models):
    try:
        return next(name for name, model in zip(("old", "new"), models) if same(folder, model))
    except ValueError as error:
        assert "holds no config.json" in str(error)
        return "none"


def test_what_fails_on_the_way_leaves_the_old_model(tmp_path, models):
    save_hf_model(models[0], tmp_path)
    with pytest.raises(RuntimeError), replace_model_files(tmp_path) as new:
        (new / SAFETENSORS_FILE).write_bytes(b"half")
        raise RuntimeError
    assert same(tmp_path, models[0])
    assert not (tmp_path / ".new").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_config.json", "m.gguf",
                                  "consolidated.safetensors"])
def test_weights_that_are_no_exports_are_not_stood_beside(tmp_path, models, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds {name}, weights that an export does not replace; name anot"):
        save_hf_model(models[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_is_not_exported_over(tmp_path, models):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds a run, whose config.json an export would overwrite"):
        save_hf_model(models[0], tmp_path)


def test_two_sets_of_weights_are_refused_with_the_older_named(tmp_path, models):
    """transformers would take model.safetensors, older loaders the index."""
    save_hf_model(models[0], tmp_path, shard_bytes=12_000)
    save_file({"x": torch.zeros(1)}, tmp_path / SAFETENSORS_FILE)
    os.utime(tmp_path / SAFETENSORS_FILE, (1, 1))
    with pytest.raises(ValueError, match="holds both .* remove the stale one, .* the older: model.safet"):
        load_hf_model(tmp_path)
