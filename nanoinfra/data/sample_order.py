"""What the loader deals: sample g of an endless global order, by (seed, g) alone and never by the mesh.

Packed: the stream EOT d1 EOT d2 EOT ...; window i is its tokens iT .. (i+1)T, an epoch is one permutation of
the (N-1)//T windows. Random: seeded tokens, document lengths uniform in 1..T, so valid targets differ per
sample. T tokens in a sample, N in the stream. Both use PCG64's raw output, which numpy promises never to
change.
"""
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from nanoinfra.data.corpus import Corpus, load_corpus
from nanoinfra.data.token_cache import cached_folder
from nanoinfra.data.train_tokenizer import Tokenizer, tokenizer_for

IGNORE = -100                                # a target that is no target, as torch's cross entropy has it


def open_source(data: str | Path, vocab: int, tokenizer: Tokenizer | None = None,
                cache: str | Path | None = None) -> "Packed | Random":
    """The source that `--data` names: `random`, or a corpus packed by `tokenizer`.

    Default is the corpus's own tokenizer of `vocab` entries (fewer where a small corpus has no more).
    """
    if str(data) == "random":
        return Random(vocab)
    corpus = load_corpus(data)
    return pack(corpus, tokenizer or tokenizer_for(corpus, vocab, cache), cache)


def pack(corpus: Corpus, tokenizer: Tokenizer, cache: str | Path | None = None) -> "Packed":
    """The train documents as one stream, mapped from the cache: the ranks of a machine share its pages."""
    def fill(folder: Path) -> None:
        tokens, starts = encode_stream([document.text for document in corpus.train], tokenizer)
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "starts.npy", starts)

    folder = cached_folder(f"tokens-{corpus.hash[:16]}-{tokenizer.hash[:16]}", fill, cache)
    tokens, starts = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "starts.npy")
    return Packed(tokens, starts, corpus, tokenizer)


def encode_stream(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """EOT, then each text and its EOT: tokens (N,) of uint16 if they fit, and where each text starts (D,)."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts, lengths = [np.array([tokenizer.eot], kind)], []
    for some in _chunks(texts, 64):                      # encodings are many times the size of their ids
        for ids in tokenizer.encode_all(some):
            parts.append(np.array([*ids, tokenizer.eot], kind))
            lengths.append(len(ids) + 1)
    starts = 1 + np.cumsum([0, *lengths[:-1]])           # (D,), after the first EOT
    return np.concatenate(parts), starts


class Packed:
    """Documents end to end. `starts[d]` is where document d begins, for masking across boundaries."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, corpus: Corpus | None = None,
                 tokenizer: Tokenizer | None = None):
        self.tokens, self.starts, self.corpus, self.tokenizer = tokens, starts, corpus, tokenizer

    def check(self, seq: int) -> None:
        """Raises ValueError where not even one sample of `seq` tokens and its last target fits."""
        if seq + 1 > len(self.tokens):
            raise ValueError(f"a sequence longer than the corpus: --seq {seq} takes {seq + 1} tokens, "
                             f"the corpus has {len(self.tokens)} to train on; try --seq "
                             f"{len(self.tokens) - 1}, or more text")

    def windows(self, seq: int) -> int:
        """Samples in one epoch: windows of `seq` inputs that do not overlap."""
        return (len(self.tokens) - 1) // seq

    def window(self, i: int, seq: int) -> np.ndarray:
        """Tokens of window i and the one after: (T+1,) int64."""
        return np.array(self.tokens[i * seq:(i + 1) * seq + 1], np.int64)

    def sample(self, g: int, seed: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of global sample g: two (T,) int64."""
        epoch, place = divmod(g, self.windows(seq))
        s = self.window(_order(seed, epoch, self.windows(seq))[place], seq)
        return s[:-1], s[1:]


class Random:
    """Tokens without meaning for a model of `vocab` entries: for parity tests and measurements of speed."""
    corpus = tokenizer = None

    def __init__(self, vocab: int):
        self.vocab = vocab

    def check(self, seq: int) -> None:
        """Every sequence length will do."""

    def sample(self, g: int, seed: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of global sample g: two (T,) int64; past the document 0 and IGNORE."""
        draw = np.random.PCG64([seed, g]).random_raw(seq + 2)
        length = 1 + int(draw[0] % seq)
        s = (draw[1:] % self.vocab).astype(np.int64)     # (T+1,)
        inside = np.arange(seq) < length
        return np.where(inside, s[:-1], 0), np.where(inside, s[1:], IGNORE)


@lru_cache(maxsize=2)                                    # a batch may straddle two epochs
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(n), kind="stable")


def _chunks(items: list, size: int) -> Iterator[list]:
    return (items[i:i + size] for i in range(0, len(items), size))
