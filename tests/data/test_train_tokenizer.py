import json
import random
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.micro_batch_loader import HeldOutSet
from nanoinfra.data.token_datasets import pack_corpus
from nanoinfra.data.train_tokenizer import (
    END_OF_TEXT_TOKEN,
    MAX_TRAINING_WORD_BYTES,
    BPETokenizer,
    get_or_train_tokenizer,
)

BYTES = BPETokenizer.train(["ab " * 1000], 257)
TEXTS = ["", "def f(x):\n    return x\n", "naïve 日本 🙂\r\n\t", "a\0b \x7f", "  two  spaces  "]


def test_257_is_bytes_and_the_end_of_text():
    assert BYTES.vocab_size == 257
    text = "".join(chr(i) for i in range(128)) + "日本🙂"
    ids = BYTES.encode(text)
    assert len(ids) == len(text.encode()) and BYTES.eot_token_id not in ids
    assert BYTES.decode(ids) == text


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_any_text_round_trips(text):
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text and len(ids) == len(text.encode())


def test_merges_are_learned(tokenizer, corpus):
    text = corpus.train[0].text
    assert tokenizer.vocab_size == 300 and tokenizer.eot_token_id < 300
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)


def test_held_out_text_teaches_nothing(tokenizer, corpus):
    want = BPETokenizer.train([d.text for d in corpus.train], 300)
    leak = BPETokenizer.train([d.text for d in corpus.train] + [d.text * 50 for d in corpus.held_out], 300)
    assert tokenizer.sha256 == want.sha256 != leak.sha256


def test_a_text_cannot_end_its_document(tokenizer):
    text = f"a{END_OF_TEXT_TOKEN}b"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, parse_special_tokens=True)
    assert tokenizer.eot_token_id not in plain and special.count(tokenizer.eot_token_id) == 1
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text


def test_a_small_text_gives_a_smaller_vocabulary():
    assert BPETokenizer.train(["abab abab"], 4096).vocab_size < 270


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    got = BPETokenizer.load(tmp_path)
    assert (got.sha256, got.eot_token_id, got.vocab_size) == (tokenizer.sha256, tokenizer.eot_token_id, 300)
    assert [got.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_transformers_loads_it(tokenizer, tmp_path, corpus):
    from transformers import AutoTokenizer
    folder = tmp_path / "own"
    tokenizer.save(folder)
    want = AutoTokenizer.from_pretrained(folder)
    assert (len(want), want.eos_token_id, want.eos_token) == (300, tokenizer.eot_token_id, END_OF_TEXT_TOKEN)
    for text in TEXTS + [document.text for document in corpus.train]:
        assert tokenizer.encode(text, parse_special_tokens=True) == want(text)["input_ids"]
        assert want.decode(tokenizer.encode(text)) == text
    want.save_pretrained(tmp_path / "again")
    assert BPETokenizer.is_saved_here(folder) and not BPETokenizer.is_saved_here(tmp_path / "again")
    with pytest.raises(ValueError, match="holds no tokenizer saved by nanoinfra"):
        BPETokenizer.load(tmp_path / "again")


def test_the_end_of_text_may_have_another_name(tmp_path):
    backend = tokenizers.Tokenizer.from_str(BYTES.backend_tokenizer.to_str().replace(END_OF_TEXT_TOKEN,
                                                                                     "</s>"))
    with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>' to end a document with"):
        BPETokenizer(backend)
    BPETokenizer(backend, "</s>").save(tmp_path)
    assert BPETokenizer.load(tmp_path).eot_token_id == BYTES.eot_token_id


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "chat_template.jinja").write_text("x"),
    lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
    lambda folder: (folder / "tokenizer_config.json").write_text("["),
    lambda folder: (folder / "tokenizer.json").write_text("{"),
    lambda folder: (folder / "tokenizer.json").unlink()])
def test_one_that_was_changed_is_none_of_ours(tmp_path, change):
    BYTES.save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer saved by nanoinfra|is not what was saved"):
        BPETokenizer.load(tmp_path)


def test_it_is_trained_once(corpus, tmp_path):
    first, second = get_or_train_tokenizer(corpus, 280, tmp_path), get_or_train_tokenizer(corpus, 280,
                                                                                          tmp_path)
    assert first.sha256 == second.sha256 and first.vocab_size == 280
    assert first.train_seconds > 0 == second.train_seconds
    assert get_or_train_tokenizer(corpus, 290, tmp_path).vocab_size == 290


@pytest.mark.parametrize("vocab", [256, 0, -1])
def test_a_vocabulary_below_the_bytes(corpus, vocab, tmp_path):
    with pytest.raises(ValueError, match=f"vocabulary of {vocab} .* try --vocab 257"):
        get_or_train_tokenizer(corpus, vocab, tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer saved by nanoinfra"):
        BPETokenizer.load(tmp_path)


LETTERS = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=250_000))


def cpu_seconds(data, cache):
    """To read `data`, learn 512 entries and encode both sides of it; the threads of all cores count."""
    begin = time.process_time()
    corpus = load_corpus(data)
    source = pack_corpus(corpus, get_or_train_tokenizer(corpus, 512, cache), cache)
    HeldOutSet(corpus.held_out, source.tokenizer, 128)
    return time.process_time() - begin


def test_a_folder_with_one_long_line_takes_at_most_twice_the_files_time(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "line.txt").write_text(LETTERS)
    (tmp_path / "folder" / "91.txt").write_text("held out")
    (tmp_path / "line").write_text(LETTERS)
    file = cpu_seconds(tmp_path / "line", tmp_path / "1")
    assert cpu_seconds(tmp_path / "folder", tmp_path / "2") <= 2 * file


@pytest.mark.parametrize("run", [LETTERS[:9_999], " " * 9_999, "\n" * 9_999, "=+/" * 3_333, "12" * 4_999])
def test_a_long_word_is_learned_from_in_parts_and_encoded_whole(run, tmp_path):
    got = BPETokenizer.train([f"a {run}", "b"], 300)
    parts = [run[i:i + MAX_TRAINING_WORD_BYTES] for i in range(0, len(run), MAX_TRAINING_WORD_BYTES)]
    first = [f" {run}"[i:i + MAX_TRAINING_WORD_BYTES] for i
             in range(0, len(run) + 1, MAX_TRAINING_WORD_BYTES)]
    assert got.sha256 in {BPETokenizer.train(["a", *own, "b"], 300).sha256 for own in (parts, first)}
    assert json.loads(got.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"
    assert got.decode(got.encode(run)) == run


def test_a_text_without_long_words_teaches_what_it_always_did():
    texts = [f"def f{i}(x):\n    return '{'x' * i}', {{'a':[{i},{i + 1}]}}\n\n" for i in range(200)]
    got = BPETokenizer.train(texts, 300)
    assert got.sha256 == "8572ea8ac3b4acc4d16c8d99be6c91d2259a7974a0bb7ec90d0cc0ca8d7f1352"
