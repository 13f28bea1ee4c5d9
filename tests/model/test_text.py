import json
import sys

import pytest
from tokenizers import Tokenizer, models

from nanoinfra.model.text import Text, read_template, read_text, render_chat

ASK = [{"role": "user", "content": "<b>2 & 2</b>"}]


@pytest.fixture
def folder(tmp_path):
    Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<|end|>": 2, "b": 3}, unk_token="a")).save(
        str(tmp_path / "tokenizer.json"))
    return tmp_path


def put(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_every_id_that_ends_a_text_is_found(folder):
    put(folder, tokenizer_config={"eos_token": {"content": "</s>"}, "bos_token": None},
        generation_config={"eos_token_id": [2, 1]}, config={"eos_token_id": None})
    got = read_text(folder)
    assert (got.ends, got.bos, got.eos) == (frozenset({1, 2}), "", "</s>")
    assert got.encode("b") == [3] and got.decode([3]) == "b"


def test_a_folder_without_tokenizer_has_no_text(tmp_path):
    assert read_text(tmp_path) is None and read_template(tmp_path) is None


def test_the_template_is_found_where_transformers_puts_it(folder):
    put(folder, tokenizer_config={"chat_template": [{"name": "tool", "template": "t"},
                                                    {"name": "default", "template": "d"}]})
    assert read_template(folder) == "d"
    put(folder, tokenizer_config={"chat_template": "one"})
    assert read_template(folder) == "one"
    (folder / "chat_template.jinja").write_text("file")
    assert read_template(folder) == "file"


def test_smollm2s_own_template_opens_the_assistants_turn(smollm2):
    _, text, template = smollm2
    got = render_chat(template, ASK, text)
    assert got == ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
                   "<|im_end|>\n<|im_start|>user\n<b>2 & 2</b><|im_end|>\n<|im_start|>assistant\n")
    assert text.encode(got, begin=False)[:4] == [1, 9690, 198, 2683]


def test_templates_get_what_transformers_gives_them(folder):
    text = Text(Tokenizer.from_file(str(folder / "tokenizer.json")), bos="<s>", eos="</s>")
    template = ("{%- for m in messages %}\n    {% if m.role != 'user' %}{% continue %}{% endif %}\n"
                "{{ bos_token }}{{ m | tojson }}{{ eos_token }}\n{% endfor %}")
    assert render_chat(template, ASK, text) == '<s>{"role": "user", "content": "<b>2 & 2</b>"}</s>\n'


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{% if %}", "cannot render"),
    ("{{ messages.append(1) }}", "unsafe|not safely"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages[0].nothing.more }}", "no attribute")])
def test_bad_templates_are_one_clear_error_and_cannot_escape(folder, template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, list(ASK), Text(Tokenizer(models.BPE())))


def test_the_hub_extra_is_named_where_jinja2_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"need the package jinja2; pip install 'nanoinfra\[hub\]'"):
        render_chat("", ASK, Text(Tokenizer(models.BPE())))
