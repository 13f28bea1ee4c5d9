"""A token's own bytes, and where it stands in the text, for every kind of tokenizer."""
import pytest

from nanoinfra.model.weights.hugging_face.tokenizer_files import open_hf_tokenizer
from nanoinfra.serve.engine.token_text_and_offsets import SingleTokenDecoder, TextOffsets
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
    text, _ = open_hf_tokenizer(save(name, tmp_path))
    spelling = SingleTokenDecoder(text)
    for string in STRINGS:
        ids, offsets = text.encode(string), TextOffsets(spelling)
        whole, made, begun = text.decode(ids), b"", False
        for token in ids:
            at = offsets.next_offset(token)    # where the character begins that `made` ends before, or within
            assert len(whole[:at].encode()) <= len(made) < len(whole[:at + 1].encode()) or at == len(whole)
            if token not in text.special_token_ids:
                made += spelling.token_bytes(token) if begun else spelling.first_token_bytes(token)
                begun = True
        assert made.decode(errors="replace") == whole and offsets.at == len(whole)


def test_parts_of_a_character_have_their_bytes(tmp_path):
    text, _ = open_hf_tokenizer(save("llama2", tmp_path))
    spelling, ids = SingleTokenDecoder(text), text.encode("a \U0001f642", add_special_tokens=False)
    assert [spelling.token_bytes(i) for i in ids[-4:]] == [b"\xf0", b"\x9f", b"\x99", b"\x82"]
    assert spelling.token_bytes(0) == b"<s>" and spelling.token_text(0) == "<s>"
    word = text.encode("the", add_special_tokens=False)[0]
    assert spelling.token_bytes(word)[:1] == b" "
    assert spelling.first_token_bytes(word) == spelling.token_bytes(word)[1:]
    assert spelling.token_bytes(10 ** 6) == b"" == spelling.first_token_bytes(10 ** 6)     # the model's alone


def test_offsets_of_hidden_tokens_and_parts_of_characters():
    spelling = SingleTokenDecoder(byte_text(["<end>"]))
    offsets = TextOffsets(spelling)
    ids = [256, *"a\u00e9".encode(), 256, *"\U0001f642b".encode(), 0xff, 99]
    got = [offsets.next_offset(token) for token in ids]
    assert got == [0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 4, 5]


def test_an_answer_begins_where_the_echoed_prompt_ends():
    offsets = TextOffsets(SingleTokenDecoder(byte_text(["<end>"])), echoed_chars=3)
    assert offsets.prompt_offsets([256, *b"abc"]) == [0, 0, 1, 2]
    assert [offsets.next_offset(token) for token in b"de"] == [3, 4]
    within = TextOffsets(SingleTokenDecoder(byte_text([])),
                         echoed_chars=2)      # a prompt that ends within a character
    assert within.prompt_offsets([97, 0xc3]) == [0, 1] and [within.next_offset(98),
                                                            within.next_offset(99)] == [2, 3]
