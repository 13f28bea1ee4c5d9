"""Text of Hugging Face folders: what transformers makes of them, or one line that says why not."""
import json
import os
import pickle
import sys
import types

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models

from nanoinfra.data import train_tokenizer as own
from nanoinfra.model.tokenizer import Text, render_chat
from nanoinfra.model.weights.hugging_face import tokenizer_files
from nanoinfra.model.weights.hugging_face.tokenizer_files import open_text
from nanoinfra.serve.engine.detokenizer import Stream
from tests.model.tokenizer_kinds import CORPUS, KINDS, STRINGS, save

ASK = [{"role": "user", "content": "<b>2 & 2</b>"}]
QWEN = """{%- if tools %}{{- '<tools>' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + eos_token + '\\n' }}
    {%- elif message.role == "assistant" %}{% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TEMPLATES = [
    QWEN, "{{ bos_token }}{{ messages | tojson }}{{ pad_token }}{{ unk_token is defined }}{{ eos_token }}",
    "{{ tools }}{{ documents }}{{ strftime_now('%Y') | length }}{{ messages | tojson(indent=2) }}",
    "{%- for m in messages %}\n    {% if m.role != 'user' %}{% continue %}{% endif %}\n{{ m.content }}\n"
    "{% endfor %}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{{ no }}",
    "{{ messages[0].nothing.more }}", "{% if %}", "{{ 1 // 0 }}",
    "{{ raise_exception('roles must alternate') }}",
    "{{ nothing + 'x' }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
CHATS = [ASK, [{"role": "system", "content": "s"}, *ASK, {"role": "assistant", "content": " a "}, *ASK],
         [{"role": "user", "content": ""}], [{"role": "tool", "content": "{}", "tool_call_id": "1"}]]


@pytest.fixture
def folder(tmp_path):
    return save("gpt2", tmp_path / "m")


def put(folder, **files):
    for name, content in files.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))


@pytest.mark.parametrize("name", KINDS)
def test_ids_and_text_are_those_of_transformers(name, tmp_path):
    save(name, tmp_path)
    want, got = transformers.AutoTokenizer.from_pretrained(tmp_path), open_text(tmp_path)[0]
    for text in (got, pickle.loads(pickle.dumps(got))):                  # as the API process has it
        for string in STRINGS:
            ids = want(string).input_ids
            assert text.encode(string) == ids, string
            plain = want(string, add_special_tokens=False).input_ids
            assert text.encode(string, begin=False) == plain, string
            assert text.decode(ids) == want.decode(ids, skip_special_tokens=True), string
    assert (got.bos, got.eos) == (want.bos_token or "", want.eos_token or "")
    assert got.special_tokens == want.special_tokens_map and want.eos_token_id in got.ends


@pytest.mark.parametrize("name", ["gpt2", "llama2", "words"])
def test_half_a_surrogate_pair_is_refused(name, tmp_path):
    text, _ = open_text(save(name, tmp_path))
    with pytest.raises(ValueError, match="half of a surrogate pair is no text"):
        text.encode("a\ud83d")


def test_what_a_tokenizer_cannot_read_is_refused():
    with pytest.raises(ValueError, match="does not take this text: WordLevel error"):
        Text(Tokenizer(models.WordLevel({"a": 0}, unk_token="nowhere"))).encode("b")


def test_every_id_that_ends_a_text_is_found(folder):
    put(folder, generation_config={"eos_token_id": [2, 4]}, config={"eos_token_id": 3})
    assert open_text(folder)[0].ends == {1, 2, 3, 4}
    for wrong in ("2", True, 1.5, [[2]], {}):
        put(folder, generation_config={"eos_token_id": wrong})
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id is .* number of a token"):
            open_text(folder)


def test_a_folder_without_a_tokenizer_has_no_text(tmp_path):
    put(tmp_path, config={"model_type": "llama"})
    assert open_text(tmp_path) == (None, None)
    put(tmp_path, tokenizer_config={"tokenizer_class": "ByT5Tokenizer"})     # which needs none
    with pytest.raises(ValueError, match="holds a tokenizer_config.json, but no tokenizer.json"):
        open_text(tmp_path)


def test_the_template_is_found_where_transformers_finds_it(folder):
    for given, want in (([{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}], "d"),
                        ({"tool": "t"}, None), ("one", "one")):
        put(folder, tokenizer_config={"chat_template": given})
        assert open_text(folder)[1] == want
    (folder / "chat_template.jinja").write_text("file")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("t")
    assert open_text(folder)[1] == "file"


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(folder, template):
    put(folder, tokenizer_config={"chat_template": template, "unk_token": "<unk>"})
    theirs, (text, got) = transformers.AutoTokenizer.from_pretrained(folder), open_text(folder)
    for chat in CHATS:
        try:
            want = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception:
            with pytest.raises(ValueError, match="cannot render these messages"):
                render_chat(got, chat, text)
        else:
            assert render_chat(got, chat, text) == want


def test_smollm2s_own_template_opens_the_assistants_turn(smollm2):
    _, text, template = smollm2
    got = render_chat(template, ASK, text)
    assert got == ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
                   "<|im_end|>\n<|im_start|>user\n<b>2 & 2</b><|im_end|>\n<|im_start|>assistant\n")
    assert text.encode(got, begin=False)[:4] == [1, 9690, 198, 2683]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name, content, says", [
    ("tokenizer.json", LFS, "a Git LFS pointer, not the file itself; fetch it"),
    ("tokenizer_config.json", LFS, "a Git LFS pointer"), ("vocab.json", LFS, "a Git LFS pointer"),
    ("chat_template.jinja", LFS, "a Git LFS pointer"),
    ("tokenizer.json", "", "tokenizer.json is not valid JSON"), ("tokenizer.json", "{", "is not valid JSON"),
    ("tokenizer.json", "{}", "transformers does not read it"), ("tokenizer.json", "[]", "holds a list"),
    ("tokenizer.json", "\x00\xff", "no text in UTF-8"), ("tokenizer.json", DEEP, "not valid JSON|recursion"),
    ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    ("tokenizer_config.json", "[]", "tokenizer_config.json holds a list"),
    ("tokenizer_config.json", '{"eos_token": 7}', "transformers does not read it"),
    ("tokenizer_config.json", '{"chat_template": 7}', "the chat template is a int|does not read"),
    ("tokenizer_config.json", '{"tokenizer_class": 7}', "does not read it"),
    ("tokenizer_config.json", '{"tokenizer_class": "CodeGenTokenizer"}', "CodeGenTokenizer, is not one of"),
    ("tokenizer_config.json", '{"tokenizer_class": "ByT5Tokenizer"}', "ByT5Tokenizer, is not one of"),
    ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}', "does not read"),
    ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"1" * 12: {}}}), "more than 8 digits"),
    ("generation_config.json", "{", "generation_config.json is not valid JSON"),
    ("special_tokens_map.json", "{", "special_tokens_map.json is not valid JSON"),
    ("added_tokens.json", "7", "added_tokens.json holds a int")])
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, content, says):
    folder = save("gpt2", tmp_path)
    (folder / "evil.py").write_text("raise SystemExit('run')")
    (folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=says) as refused:
        open_text(folder)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def test_a_huge_file_is_refused_before_it_is_read(folder):
    os.truncate(folder / "tokenizer.json", tokenizer_files.MOST_BYTES + 1)
    with pytest.raises(ValueError, match="tokenizer.json has 268435457 bytes"):
        open_text(folder)


def test_a_slow_tokenizer_that_cannot_be_converted_is_refused(folder, monkeypatch):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")       # no sentencepiece model
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="need the package sentencepiece"):
        open_text(folder)
    monkeypatch.setitem(sys.modules, "sentencepiece", sys)
    monkeypatch.setitem(sys.modules, "google.protobuf", sys)
    with pytest.raises(ValueError, match="transformers does not read it"):
        open_text(folder)


def test_a_sentencepiece_model_is_converted(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is in the hub extra")
    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 5), model_writer=file, vocab_size=330, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=False)
    put(tmp_path, config={"model_type": "llama"}, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    want, got = transformers.AutoTokenizer.from_pretrained(tmp_path), open_text(tmp_path)[0]
    assert all(got.encode(string) == want(string).input_ids for string in STRINGS)
    assert len(got.encode("the cat")) < 5


@pytest.mark.parametrize("there, says", [
    (None, r"need the package transformers; pip install 'nanoinfra\[hub\]'"),
    (types.SimpleNamespace(__version__="4.57.0"), "need transformers 5 or newer, here is 4.57.0")])
def test_without_transformers_5_a_folder_is_refused_and_our_own_is_read(monkeypatch, tmp_path, there, says):
    own.Tokenizer.train(["one two"] * 9, vocab=258).save(tmp_path / "own")
    save("gpt2", tmp_path / "theirs")
    monkeypatch.setitem(sys.modules, "transformers", there)
    text, template = open_text(tmp_path / "own")
    assert text.decode(text.encode("two")) == "two" and template is None and text.ends == {0}
    with pytest.raises(ValueError, match=says):
        open_text(tmp_path / "theirs")
    with pytest.raises(ValueError, match=says):
        render_chat("", ASK, text)


def test_a_tokenizer_of_our_own_that_was_changed_is_read_by_transformers(tmp_path):
    own.Tokenizer.train(["one two"] * 9, vocab=258).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("chat")
    text, template = open_text(tmp_path)
    assert template == "chat" and text.ends == {0}


def test_jinja2_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"need the package jinja2; pip install 'nanoinfra\[hub\]'"):
        render_chat("", ASK, Text(Tokenizer(models.BPE())))


def test_a_panic_of_the_tokenizers_package_is_an_error_of_that_text():
    """Its Strip decoder panics over a token of which nothing is left."""
    backend = Tokenizer(models.WordLevel({"a": 0, " ": 1}, unk_token="a"))
    backend.decoder = decoders.Strip(" ", 1, 2)
    text = Text(backend)
    assert text.decode([0]) == "a"
    with pytest.raises(RuntimeError, match="panicked"):
        text.decode([1])
    stream = Stream(text)
    with pytest.raises(RuntimeError, match="panicked"):
        stream.push(1) + stream.finish()
