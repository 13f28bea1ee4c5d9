"""The datasets: sample g of an endless global order depends on (seed, g) alone, never on the mesh.

PackedDataset holds the stream EOT d1 EOT d2 EOT ...; window i is its tokens iT .. (i+1)T, and an epoch is one
permutation of the (N-1)//T windows. RandomTokenDataset makes seeded tokens with document lengths uniform in
1..T, so that samples differ in valid targets. T tokens in a sample, N in the stream. Both use PCG64's raw
output, which numpy promises never to change.
"""
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanoinfra.data.corpus import Corpus, load_corpus
from nanoinfra.data.tokenizer_and_token_cache import get_or_build_folder
from nanoinfra.data.train_tokenizer import BPETokenizer, get_or_train_tokenizer

IGNORE_INDEX = -100  # a target that the loss ignores, as in torch's cross entropy


def open_dataset(data: str | Path, vocab_size: int, tokenizer: BPETokenizer | None = None,
                 cache: str | Path | None = None) -> "PackedDataset | RandomTokenDataset":
    """Open what --data names: random tokens below `vocab_size`, or a corpus packed with `tokenizer`.

    By default the corpus's own tokenizer of `vocab_size` entries is trained (a small corpus may have fewer).
    """
    if str(data) == "random":
        return RandomTokenDataset(vocab_size)
    corpus = load_corpus(data)
    return pack_corpus(corpus, tokenizer or get_or_train_tokenizer(corpus, vocab_size, cache), cache)


def pack_corpus(corpus: Corpus, tokenizer: BPETokenizer, cache: str | Path | None = None) -> "PackedDataset":
    """Encode the train documents as one token stream, memory-mapped so that ranks share it."""
    def write_files(folder: Path) -> None:
        tokens, starts = encode_token_stream([document.text for document in corpus.train], tokenizer)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "starts.npy", starts)

    folder = get_or_build_folder(f"tokens-{corpus.sha256[:16]}-{tokenizer.sha256[:16]}", write_files, cache)
    tokens, starts = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "starts.npy")
    return PackedDataset(tokens, starts, corpus, tokenizer)


def encode_token_stream(texts: list[str], tokenizer: BPETokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Encode EOT, then each text and its EOT: tokens (N,), uint16 if they fit, and each text's start (D,)."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths = [np.array([tokenizer.eot_token_id], kind)], []
    for some in _chunks(texts, 64):                      # an encoding takes many times the memory of its ids
        for ids in tokenizer.encode_batch(some):
            parts.append(np.array([*ids, tokenizer.eot_token_id], kind))
            lengths.append(len(ids) + 1)
    starts = 1 + np.cumsum([0, *lengths[:-1]])           # (D,), after the first EOT
    return np.concatenate(parts), starts


class PackedDataset:
    """Documents packed end to end in one token stream; document d begins at `document_starts[d]`."""

    def __init__(self, tokens: np.ndarray, document_starts: np.ndarray, corpus: Corpus | None = None,
                 tokenizer: BPETokenizer | None = None):
        self.tokens, self.document_starts = tokens, document_starts
        self.corpus, self.tokenizer = corpus, tokenizer

    def check_seq_len(self, seq_len: int) -> None:
        """Raise ValueError when not even one sample of `seq_len` tokens and its last target fits."""
        if seq_len + 1 > len(self.tokens):
            raise ValueError(f"a sequence longer than the corpus: --seq {seq_len} takes {seq_len + 1} "
                             f"tokens, the corpus has {len(self.tokens)} to train on; try --seq "
                             f"{len(self.tokens) - 1}, or more text")

    def samples_per_epoch(self, seq_len: int) -> int:
        """Count the samples of an epoch: windows of `seq_len` inputs that do not overlap."""
        return (len(self.tokens) - 1) // seq_len

    def read_window(self, window_index: int, seq_len: int) -> np.ndarray:
        """Read the tokens of a window and the one after: (T+1,) int64."""
        return np.array(self.tokens[window_index * seq_len:(window_index + 1) * seq_len + 1], np.int64)

    def get_sample(self, sample_index: int, seed: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a sample of the global order: two (T,) int64."""
        epoch, place = divmod(sample_index, self.samples_per_epoch(seq_len))
        s = self.read_window(_order(seed, epoch, self.samples_per_epoch(seq_len))[place], seq_len)
        return s[:-1], s[1:]


class RandomTokenDataset:
    """Random token ids below `vocab_size`, for parity tests and measurements of speed."""
    corpus = tokenizer = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def check_seq_len(self, seq_len: int) -> None:
        """Accept every sequence length."""

    def get_sample(self, sample_index: int, seed: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, two (T,) int64; after the document they are 0 and IGNORE_INDEX."""
        draw = np.random.PCG64([seed, sample_index]).random_raw(seq_len + 2)
        length = 1 + int(draw[0] % seq_len)
        s = (draw[1:] % self.vocab_size).astype(np.int64)     # (T+1,)
        inside = np.arange(seq_len) < length
        return np.where(inside, s[:-1], 0), np.where(inside, s[1:], IGNORE_INDEX)


@lru_cache(maxsize=2)                                    # a batch may straddle two epochs
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i:i + size] for i in range(0, len(items), size))
