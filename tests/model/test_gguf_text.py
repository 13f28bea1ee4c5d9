"""The ids stand literally below. They were got, and are got again here, from a byte-level BPE written out in
`by_hand`, with SmolLM2's published pre-tokeniser (each digit alone, then GPT-2's expression) and the
vocabulary and merges of the file; it shares no code with the `tokenizers` package.
"""
import json

import pytest
import regex
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from nanoinfra.model import gguf_text
from nanoinfra.model.gguf_text import build_text, byte_level_bpe

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IDS = {
    "In 2024, it rained 3.14 mm!":
        [788, 216, 34, 32, 34, 36, 28, 357, 689, 1210, 216, 35, 30, 33, 36, 7610, 17],
    "def f(x):\n    return x ** 2\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 198],
    "na\xefve caf\xe9 \u2014 \u65e5\u672c\u8a9e \U0001f642":
        [3546, 46494, 37366, 1841, 17097, 241, 115, 40993, 179, 120, 248, 47526],
    "  two  spaces\t\n\n end ": [216, 827, 216, 5600, 197, 1116, 1112, 216],
    "it's we'll I'M": [269, 506, 392, 3060, 339, 23, 61],
    "x\xb2\xbd\u2167\u0661\u0662": [104, 19133, 16738, 173, 223, 117, 164, 111, 164, 112],
}


def alphabet():
    """GPT-2's visible character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(rest)}


def by_hand(text, ids, merges):
    """Split at digits, then into words; in each word merge the pair learned first until none is left."""
    rank, shown = {tuple(pair): i for i, pair in enumerate(merges)}, alphabet()
    out = []
    for part in regex.findall(r"\p{N}|[^\p{N}]+", text):
        for word in regex.findall(WORDS, part):
            parts = [shown[b] for b in word.encode()]
            while pairs := [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                            if pair in rank]:
                i = min(pairs)[1]
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            out += [ids[part] for part in parts]
    return out


@pytest.fixture
def text(smollm2):
    return smollm2[1]


@pytest.fixture(scope="module")
def learned(smollm2):
    """What the file lists: ids by token, and the merges in their order."""
    model = json.loads(smollm2[1].backend.to_str())["model"]
    return model["vocab"], model["merges"]


@pytest.mark.parametrize("string, want", IDS.items())
def test_smollm2_gives_the_literal_ids(text, learned, string, want):
    assert text.encode(string) == want
    assert by_hand(string, *learned) == want
    assert text.decode(want) == string


def test_control_tokens_are_recognised_by_name_and_left_out_of_text(text):
    assert text.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert text.decode([1, 4093, 198, 26843, 2]) == "user\nHi"
    assert (text.ends, text.bos, text.eos) == (frozenset({2}), "<|im_start|>", "<|im_end|>")


def pieces(pre, string):
    split = byte_level_bpe(["a"], [], pre).pre_tokenizer.pre_tokenize_str(string)
    return [piece.replace("\u0120", " ") for piece, _ in split]


@pytest.mark.parametrize("pre, want", [
    ("gpt-2", ["a", " 12345", "'s", "?!", " ok"]),
    ("smollm", ["a", " ", "1", "2", "3", "4", "5", "'s", "?!", " ok"]),
    ("qwen2", ["a", " ", "1", "2", "3", "4", "5", "'s", "?!", " ok"]),
    ("llama-bpe", ["a", " ", "123", "45", "'s", "?!", " ok"])])
def test_each_known_name_splits_its_own_way(pre, want):
    assert pieces(pre, "a 12345's?! ok") == want


def test_qwens_expression_is_its_own_tokenizers():
    assert gguf_text.WORDS + r"\p{N}" + gguf_text.REST == PRETOKENIZE_REGEX


def test_begin_of_text_is_written_where_the_file_asks_for_it():
    header = {"model": "gpt2", "pre": "gpt-2", "tokens": ["<s>", "a"], "merges": [], "token_type": [3, 1],
              "bos_token_id": 0, "add_bos_token": True}
    text = build_text({f"tokenizer.ggml.{key}": lambda value=value: value for key, value in header.items()})
    assert text.encode("aa") == [0, 1, 1] and text.encode("aa", begin=False) == [1, 1]


@pytest.mark.parametrize("key, value, message", [
    ("pre", "tekken", "pre-tokeniser 'tekken' is unknown .known: gpt-2, smollm, qwen2, llama-bpe"),
    ("pre", None, "pre-tokeniser 'default' is unknown"),
    ("model", "llama", "tokenizer is a 'llama', but only")])
def test_unknown_tokenizers_are_refused(key, value, message):
    header = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "merges": []} | {key: value}
    with pytest.raises(ValueError, match=message):
        build_text({f"tokenizer.ggml.{k}": lambda v=v: v for k, v in header.items() if v is not None})
