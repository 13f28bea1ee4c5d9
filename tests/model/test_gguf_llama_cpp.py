"""What our decoder and tokenizers make of GGUF files is what llama.cpp, whose format it is, makes of them.

Recorded by record_llama_cpp.py; `make prove` asks anew where llama.cpp is installed.
"""
import json
import pickle

import pytest
import torch

from nanoinfra.model.weights.gguf.load_gguf import load_gguf_model, open_gguf_weights
from tests.model.gguf_files import models, prompt, write_model
from tests.model.gguf_tokenizers import STRINGS, tokenizers
from tests.model.record_llama_cpp import RECORDED, SHOWN, ask_ids, ask_logits, shown

WANT = json.loads(RECORDED.read_text())
TABLE = 5e-3                                 # GPT-2's GELU is a table of float16 there
ROUNDED = 5e-2                               # of all, where llama.cpp quantises the inputs as it does weights


def ours(path):
    with torch.no_grad():
        return load_gguf_model(path)[0](torch.tensor([prompt()]))[0]


def assert_near(got, want, name, how):
    want = torch.tensor(want)
    assert want.std() > 0.5
    if "kind" in how:
        assert (got - want).norm() <= ROUNDED * want.norm(), name
    else:
        assert (got - want).abs().max() <= (TABLE if name.startswith("gpt2") else 1e-4), name


@pytest.mark.parametrize("name", models())
def test_logits_are_llama_cpps(tmp_path, name):
    architecture, how = models()[name]
    got = shown(ours(write_model(tmp_path / "m.gguf", architecture, **how)), how)
    assert_near(got[:, :SHOWN], WANT[f"logits {name}"], name, how)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """{name: Text} of all small tokenizers, as they come to another process."""
    path = tmp_path_factory.mktemp("tokenizers") / "t.gguf"
    return {name: pickle.loads(pickle.dumps(open_gguf_weights(write_model(path, "llama", **how)).tokenizer))
            for name, how in tokenizers().items()}


@pytest.mark.parametrize("name", tokenizers())
def test_ids_and_ends_are_llama_cpps(texts, name):
    for string, want in zip(STRINGS, WANT[f"ids {name}"], strict=True):
        assert texts[name].encode(string) == want, repr(string)
    assert sorted(texts[name].eos_token_ids) == WANT[f"ends {name}"]


@pytest.mark.parametrize("name", tokenizers())
def test_text_comes_back(texts, name):
    """Control tokens are left out; sentencepiece puts a space before every stretch between special tokens."""
    lost = "<" if name.startswith("bpe") else "<\u2581"
    plain = [string for string in STRINGS if not set(lost) & set(string)]
    assert len(plain) > 90
    for string in plain:
        assert texts[name].decode(texts[name].encode(string)) == string
    got = texts[name].decode(texts[name].encode("<|user|>\nHi<|end|>\n"))
    assert got.replace(" ", "") == ("Hi" if "phi-3" in name else "\nHi\n")


def test_the_recording_is_small():
    assert RECORDED.stat().st_size < 200_000 and len(STRINGS) > 100


@pytest.mark.prove
def test_llama_cpp_says_the_same_today(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is asked: pip install llama-cpp-python (it compiles)")
    for name, (architecture, how) in models().items():
        path = write_model(tmp_path / "m.gguf", architecture, **how)
        assert_near(ours(path), ask_logits(path, prompt()), name, how)
    for name, how in tokenizers().items():
        path = write_model(tmp_path / "t.gguf", "llama", **how)
        text, (ids, ends) = open_gguf_weights(path).tokenizer, ask_ids(path, STRINGS)
        assert ([text.encode(string) for string in STRINGS], sorted(text.eos_token_ids)) == (ids, ends), name
