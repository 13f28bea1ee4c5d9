"""The ids stand literally below. They were got, and are got again here, from a byte-level BPE written out in
`by_hand`, with SmolLM2's published pre-tokeniser (each digit alone, then GPT-2's expression) and the
vocabulary and merges of the file; it shares no code with the `tokenizers` package.
"""
import json

import numpy as np
import pytest
import regex
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from nanoinfra.model.weights.gguf import bpe_tokenizer, sentencepiece_tokenizer
from nanoinfra.model.weights.gguf.bpe_tokenizer import byte_level_bpe
from nanoinfra.model.weights.gguf.tokenizer import build_text
from tests.model.gguf_tokenizers import alphabet

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
    assert (text.bos, text.eos) == ("<|im_start|>", "<|im_end|>")
    assert text.ends == {0, 2, 4}            # by name, as in llama.cpp, <|endoftext|> and <reponame> too
    assert text.encode("<|endoftext|>") == [0]


def pieces(pre, string):
    split = byte_level_bpe(["a"], [], pre).pre_tokenizer.pre_tokenize_str(string)
    return [piece.replace("\u0120", " ") for piece, _ in split]


@pytest.mark.parametrize("pre, want", [
    ("gpt-2", ["a", " 12345", "'s", "?!", " ok"]),
    ("smollm", ["a", " ", "1", "2", "3", "4", "5", "'s", "?!", " ok"]),
    ("qwen2", ["a", " ", "1", "2", "3", "4", "5", "'s", "?!", " ok"]),
    ("llama-bpe", ["a", " ", "123", "45", "'s", "?!", " ok"]),
    ("default", ["a", " ", "123", "45", "'", "s", "?!", " ok"])])
def test_each_known_name_splits_its_own_way(pre, want):
    assert pieces(pre, "a 12345's?! ok") == want


def test_qwens_expression_is_its_own_tokenizers_but_for_the_long_s():
    """(?i:'s) finds \u017f too, llama.cpp does not."""
    got = bpe_tokenizer.PRE["qwen2"].expressions[0]
    assert got.replace(bpe_tokenizer.CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)") == PRETOKENIZE_REGEX


def built(model="gpt2", tokens=("<s>", "a"), kinds=(3, 1), **header):
    """A tokenizer of a few tokens, of whatever else the file says."""
    given = {"pre": "gpt-2", "merges": []} if model == "gpt2" else {}
    given |= {"model": model, "tokens": list(tokens), "token_type": np.array(kinds)} | header
    return build_text({f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None})


def test_begin_and_end_of_text_are_written_where_the_file_asks_for_them():
    text = built(bos_token_id=0, add_bos_token=True)
    assert text.encode("aa") == [0, 1, 1] and text.encode("aa", begin=False) == [1, 1]
    text = built(eos_token_id=0, add_eos_token=True)
    assert text.encode("aa") == [1, 1, 0]
    assert built(pre="llama-bpe", bos_token_id=0).encode("a") == [0, 1]   # llama.cpp's where not said
    assert built(pre="llama-bpe", bos_token_id=0, add_bos_token=False).encode("a") == [1]


SPM = ("<unk>", "<s>", "</s>", *sentencepiece_tokenizer.BYTES, "a", "b", "c", "\u2581")
KINDS = (2, 3, 3, *[6] * 256, 1, 1, 1, 1)


def scored(*unions, **header):
    """A sentencepiece tokenizer with `unions`, (token, score) each."""
    tokens, scores = zip(*unions) if unions else ((), ())
    return built("llama", SPM + tokens, KINDS + (1,) * len(tokens), **{
        "scores": np.array([0.0] * len(SPM) + list(scores), np.float32), **header})


def test_sentencepiece_joins_by_score_then_from_the_left():
    first = len(SPM)
    assert scored(("ab", -1.0), ("bc", -2.0)).encode("abc", begin=False) == [262, first, 261]
    assert scored(("ab", -2.0), ("bc", -1.0)).encode("abc", begin=False) == [262, 259, first + 1]
    runs = scored(*[("\u2581" * n, -1e9) for n in (2, 3, 4)])
    assert runs.encode("      ", begin=False) == [first + 2, first + 1]   # seven: four, then three


def test_sentencepieces_space_and_bytes():
    text = scored()
    assert text.encode("a\u20ac</s>b") == [1, 262, 259, 3 + 0xe2, 3 + 0x82, 3 + 0xac, 2, 262, 260]
    assert text.decode(text.encode("a\u20ac b")) == "a\u20ac b" and text.decode([3 + 0xe2, 259]) == "\ufffda"
    text = scored(add_space_prefix=False, add_bos_token=False)
    assert text.encode(" a") == [262, 259] and text.decode([262, 259]) == " a" and text.encode("") == []
    assert (scored().bos, scored().eos, scored().ends) == ("<s>", "</s>", {2})      # likewise


def test_phi_3s_special_tokens_swallow_the_space_after_them():
    header = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": list(SPM),
              "general.name": "Phi-3 mini", "tokenizer.ggml.token_type": np.array(KINDS),
              "tokenizer.ggml.scores": np.zeros(len(SPM), np.float32)}
    assert build_text(header).encode("</s>  a<s> b", begin=False) == [2, 262, 259, 1, 262, 262, 260]
    header["general.name"] = "Llama"
    assert build_text(header).encode("</s>  a", begin=False) == [2, 262, 262, 262, 259]


@pytest.mark.parametrize("how, message", [
    ({"pre": "viking"}, "pre-tokeniser 'viking' is unknown .known: default, gpt-2"),
    ({"pre": None}, "pre-tokeniser None is unknown"),
    ({"model": "t5"}, "tokenizer is a 't5', but only 'gpt2' and 'llama' are known"),
    ({"tokens": ("a", "a")}, "two of one name"),
    ({"tokens": ()}, "no tokens"),
    ({"kinds": (1,)}, "2 tokens, but 1 types"),
    ({"merges": ["ab"]}, "merge 'ab' is not two tokens"),
    ({"merges": ["a b"]}, "merges do not fit its tokens"),
    ({"merges": 3}, "the key tokenizer.ggml.merges is '3', not a list of strings"),
    ({"eos_token_id": 2}, "eos_token_id is 2, but there are 2 tokens"),
    ({"add_bos_token": True}, "asks for a bos token with every text, but names none"),
    ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
    ({"model": "llama", "scores": np.zeros(2)}, "lacks the token <0x00> for a byte"),
    ({"model": "llama", "scores": np.zeros(1)}, "2 tokens, but 1 scores"),
    ({"model": "llama", "scores": np.array([0, np.nan])}, "some that are no numbers"),
], ids=str)
def test_unknown_and_broken_tokenizers_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        built(**how)


def test_what_tokenizers_cannot_join_as_sentencepiece_does_is_refused():
    with pytest.raises(ValueError, match="gives .* the same score -1.0, so that nothing says which"):
        scored(("ab", -1.0), ("bc", -1.0))
    with pytest.raises(ValueError, match="has 'ax', but not every character of it as a token"):
        scored(("ax", -1.0))
    scored(("ab", -1.0), ("cc", -1.0))       # these cannot meet
