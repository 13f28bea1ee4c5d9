"""A token's own bytes, and where it stands in the text, for every kind of tokenizer."""
import pytest

from nanoinfra.model.weights.hugging_face.tokenizer_files import open_text
from nanoinfra.serve.engine.token_text import Offsets, Spelling
from tests.model.tokenizer_kinds import KINDS, STRINGS, save
from tests.serve.letters import byte_text

INEXACT = {"unigram with bytes": "<0xE2> as a word", "t5": "clean-up", "bert": "clean-up",
           "words cleaned": "clean-up", "ends of words": "a space that comes with the next word",
           "far-reaching decoder": "text changed later", "ctc": "repeats"}     # no family here brings these
HERE = ("gpt2", "llama2", "gemma", "added tokens")


@pytest.mark.parametrize("name", [
    name if name in HERE else pytest.param(name, marks=pytest.mark.prove)
    for name in KINDS if name not in INEXACT])
def test_the_bytes_of_tokens_make_the_text_and_offsets_count_its_characters(name, tmp_path):
    text, _ = open_text(save(name, tmp_path))
    spelling = Spelling(text)
    for string in STRINGS:
        ids, offsets = text.encode(string), Offsets(spelling)
        whole, made, begun = text.decode(ids), b"", False
        for token in ids:
            at = offsets.next(token)         # where the character begins that `made` ends before, or within
            assert len(whole[:at].encode()) <= len(made) < len(whole[:at + 1].encode()) or at == len(whole)
            if token not in text.special_ids:
                made, begun = made + (spelling.bytes(token) if begun else spelling.first(token)), True
        assert made.decode(errors="replace") == whole and offsets.at == len(whole)


def test_parts_of_a_character_have_their_bytes(tmp_path):
    text, _ = open_text(save("llama2", tmp_path))
    spelling, ids = Spelling(text), text.encode("a \U0001f642", begin=False)
    assert [spelling.bytes(i) for i in ids[-4:]] == [b"\xf0", b"\x9f", b"\x99", b"\x82"]
    assert spelling.bytes(0) == b"<s>" and spelling.token(0) == "<s>"
    word = text.encode("the", begin=False)[0]
    assert spelling.bytes(word)[:1] == b" " and spelling.first(word) == spelling.bytes(word)[1:]
    assert spelling.bytes(10 ** 6) == b"" == spelling.first(10 ** 6)     # of the model's, not the tokenizer's


def test_offsets_of_hidden_tokens_and_parts_of_characters():
    spelling = Spelling(byte_text(["<end>"]))
    offsets = Offsets(spelling)
    ids = [256, *"a\u00e9".encode(), 256, *"\U0001f642b".encode(), 0xff, 99]
    got = [offsets.next(token) for token in ids]
    assert got == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 5]


def test_an_answer_begins_where_the_echoed_prompt_ends():
    offsets = Offsets(Spelling(byte_text(["<end>"])), echoed=3)
    assert offsets.of_prompt([256, *b"abc"]) == [0, 0, 1, 2]
    assert [offsets.next(token) for token in b"de"] == [3, 4]
    within = Offsets(Spelling(byte_text([])), echoed=2)      # a prompt that ends within a character
    assert within.of_prompt([97, 0xc3]) == [0, 1] and [within.next(98), within.next(99)] == [2, 3]
