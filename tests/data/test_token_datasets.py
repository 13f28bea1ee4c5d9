import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.token_datasets import (
    IGNORE_INDEX,
    PackedDataset,
    RandomTokenDataset,
    encode_token_stream,
    open_dataset,
    pack_corpus,
)
from nanoinfra.data.tokenizer_and_token_cache import _CACHE_FORMAT
from nanoinfra.data.train_tokenizer import BPETokenizer, get_or_train_tokenizer

BYTES = BPETokenizer.train(["a"], 257)
COUNT = PackedDataset(np.arange(101), np.array([1]))  # ten windows of ten; a token is its own place


def documents(source):
    ends = [*source.document_starts[1:] - 1, len(source.tokens) - 1]   # each document's EOT
    assert all(source.tokens[end] == source.tokenizer.eot_token_id for end in ends)
    return [source.tokenizer.decode(source.tokens[a:b]) for a, b in zip(source.document_starts, ends)]


def test_the_stream_holds_every_train_document(packed, corpus):
    assert packed.tokens[0] == packed.tokenizer.eot_token_id
    assert documents(packed) == [d.text for d in corpus.train]
    assert (packed.tokens == packed.tokenizer.eot_token_id).sum() == len(corpus.train) + 1
    assert "" in documents(packed)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=9), min_size=1, max_size=70))
def test_any_documents_round_trip(texts):
    assert documents(PackedDataset(*encode_token_stream(texts, BYTES), tokenizer=BYTES)) == texts


def test_tokens_are_as_small_as_fits_and_mapped(packed, corpus, tokenizer, cache, monkeypatch):
    assert packed.tokens.dtype == np.uint16 and isinstance(packed.tokens, np.memmap)
    monkeypatch.setattr(BPETokenizer, "encode_batch", None)        # a second time must not encode
    assert np.array_equal(pack_corpus(corpus, tokenizer, cache).tokens, packed.tokens)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer, "vocab_size", 1 << 17)
    assert encode_token_stream(["a"], tokenizer)[0].dtype == np.uint32


def test_another_tokenizer_packs_anew(packed, corpus, cache):
    other = pack_corpus(corpus, get_or_train_tokenizer(corpus, 280, cache), cache)
    assert len(other.tokens) > len(packed.tokens) and documents(other) == documents(packed)


def test_windows_do_not_overlap_and_meet_in_a_target(packed):
    seq = 7
    n = packed.samples_per_epoch(seq)
    got = np.concatenate([packed.read_window(i, seq)[:-1] for i in range(n)])
    assert np.array_equal(got, packed.tokens[:n * seq])
    assert all(packed.read_window(i, seq)[-1] == packed.read_window(i + 1, seq)[0] for i in range(n - 1))
    assert n == (len(packed.tokens) - 1) // seq and packed.read_window(n - 1, seq).shape == (seq + 1,)


def test_targets_are_the_next_tokens():
    for g in range(30):
        x, y = COUNT.get_sample(g, seed=3, seq_len=10)
        assert x.dtype == y.dtype == np.int64 and x[0] % 10 == 0
        assert np.array_equal(x, np.arange(x[0], x[0] + 10)) and np.array_equal(y, x + 1)


def test_an_epoch_is_a_permutation():
    def epoch(seed, k):
        return [int(COUNT.get_sample(10 * k + place, seed, 10)[0][0]) // 10 for place in range(10)]
    assert all(sorted(epoch(seed, k)) == list(range(10)) for seed in range(3) for k in range(3))
    assert len({tuple(epoch(seed, k)) for seed in range(3) for k in range(3)}) == 9
    assert epoch(0, 0) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]      # the order is for ever


def test_random_documents_differ_in_length():
    source = RandomTokenDataset(vocab_size=257)
    got = [source.get_sample(g, seed=1, seq_len=16) for g in range(400)]
    valid = [int((y != IGNORE_INDEX).sum()) for _, y in got]
    assert set(valid) == set(range(1, 17))
    for (x, y), n in zip(got, valid):
        assert (y[:n] != IGNORE_INDEX).all() and (y[n:] == IGNORE_INDEX).all() and (x[n:] == 0).all()
        assert np.array_equal(x[1:n], y[:n - 1]) and 0 <= min(x) and max(x.max(), y.max()) < 257
    assert len(np.unique(np.concatenate([x for x, _ in got]))) == 257


def test_a_random_sample_depends_on_seed_and_index_alone():
    want = [RandomTokenDataset(257).get_sample(g, 5, 12) for g in range(20)]
    source = RandomTokenDataset(257)
    got = [source.get_sample(g, 5, 12) for g in reversed(range(20))][::-1]
    assert all(np.array_equal(a, b) for w, s in zip(want, got) for a, b in zip(w, s))
    assert not np.array_equal(want[0][0], RandomTokenDataset(257).get_sample(0, 6, 12)[0])
    assert want[0][0].tolist() == [25, 234, 62, 8, 61, 0, 0, 0, 0, 0, 0, 0]


def test_open_source(folder, cache, tokenizer):
    random = open_dataset("random", 99)
    assert isinstance(random, RandomTokenDataset) and random.vocab_size == 99
    got = open_dataset(folder, 300, cache=cache)
    assert got.tokenizer.sha256 == tokenizer.sha256 and len(got.corpus.held_out) > 0
    assert open_dataset(folder, 300, tokenizer=BYTES, cache=cache).tokenizer is BYTES


def test_a_sequence_longer_than_the_corpus():
    with pytest.raises(ValueError, match="--seq 101 takes 102 tokens, the corpus has 101 .* try --seq 100,"):
        COUNT.check_seq_len(101)
    COUNT.check_seq_len(100)
    assert COUNT.samples_per_epoch(100) == 1
    # the last target needs a token too
    assert PackedDataset(np.arange(100), np.array([1])).samples_per_epoch(10) == 9


def damage(cache):
    """4 kB of the tokens are zeros, as a disk that lost power may leave them, and the tokenizer is cut."""
    tokens, = cache.glob("*/tokens-*/*/tokens.npy")
    tokenizer, = cache.glob("*/tokenizer-*/*/tokenizer.json")
    with tokens.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))
    os.truncate(tokenizer, 1000)


def test_damaged_tokens_and_tokenizers_are_made_again(corpus, tmp_path, capfd):
    want = pack_corpus(corpus, get_or_train_tokenizer(corpus, 280, tmp_path), tmp_path)
    tokens = np.array(want.tokens)
    damage(tmp_path)
    got = pack_corpus(corpus, get_or_train_tokenizer(corpus, 280, tmp_path), tmp_path)
    assert got.tokenizer.sha256 == want.tokenizer.sha256 and np.array_equal(got.tokens, tokens)
    said = capfd.readouterr().err.splitlines()
    assert [line.rpartition(" is not as it was written: ")[2] for line in said] == [
        "tokenizer.json changed; it is made again", "tokens.npy changed; it is made again"]


def racer(folder, cache, barrier, queue):
    corpus = load_corpus(folder)
    for damaged in (False, True):
        if barrier.wait() == 0 and damaged:
            damage(cache)
        barrier.wait()
        source = pack_corpus(corpus, get_or_train_tokenizer(corpus, 290, cache), cache)
        queue.put((source.tokenizer.sha256, int(source.tokens.sum()), len(source.tokens)))


def test_processes_may_race_for_the_cache(folder, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, queue = spawn.Barrier(3), spawn.Queue()
    racers = [spawn.Process(target=racer, args=(folder, tmp_path, barrier, queue)) for _ in range(3)]
    for process in racers:
        process.start()
    for process in racers:
        process.join()                       # first: from one that has failed nothing would come
    got = {queue.get() for process in racers if process.exitcode == 0 for _ in range(2)}
    assert [process.exitcode for process in racers] == [0, 0, 0] and len(got) == 1
    names = sorted(path.name.split("-")[0] for path in (tmp_path / _CACHE_FORMAT).iterdir())
    assert names == ["tokenizer", "tokens"]
