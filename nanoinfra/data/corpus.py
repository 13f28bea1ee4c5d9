"""The text corpus: documents to train on, held-out documents, and a hash that identifies them.

A file is held out when sha256(its relative path) % 20 == 0, a piece of a single file when sha256(its content)
% 20 == 0, so that adding a file moves no other and equal pieces stay on one side of the split. The
embedded corpus is this machine's Python standard library (it differs by Python version: name the hash). Files
are read by read_text_files.py. Feeds train_tokenizer.py and token_datasets.py.
"""
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nanoinfra.data.read_text_files import (
    SkippedFile,
    read_text_file,
    read_text_folder,
    summarize_skip_reasons,
)

_HELD_OUT_EVERY = 20                  # one document in 20 is held out
_PIECE_CHARS = 8192                   # characters after which a single file is split, at the next blank line


class Document(NamedTuple):
    """One text and where it came from."""
    path: str                  # relative to the corpus, with /; `name#3` is the third piece of a file
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents split into `train` and `held_out`; `skipped` lists the files that were left out, and why."""
    name: str                                # as given to --data
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: tuple[SkippedFile, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """SHA-256, in hexadecimal, over every path and text and its side of the split."""
        digest = hashlib.sha256()
        for side in (self.train, self.held_out):
            digest.update(len(side).to_bytes(8, "little"))
            for part in (part for document in side for part in document):
                digest.update(_sha256(part))
        return digest.hexdigest()

    @property
    def train_and_held_out_bytes(self) -> tuple[int, int]:
        """UTF-8 bytes of the train and of the held-out documents."""
        return count_utf8_bytes(self.train), count_utf8_bytes(self.held_out)


def load_corpus(data: str | Path = "stdlib") -> Corpus:
    """Load the corpus `stdlib`, or the text file or folder at the path `data`.

    Raises ValueError when it cannot be read, is empty, or is one document that cannot be split.
    """
    try:
        if str(data) == "stdlib":
            return _stdlib()
        return _folder(Path(data)) if Path(data).is_dir() else _file(Path(data))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot read --data {data}: {reason}; give stdlib, random, or a text file or "
                         "folder that you may read") from error


def count_utf8_bytes(documents: Iterable[Document]) -> int:
    """Count the UTF-8 bytes of all documents, the denominator of bits per byte."""
    return sum(len(document.text.encode()) for document in documents)


def _stdlib() -> Corpus:
    def enter(folder: str) -> bool:
        return folder not in ("site-packages", "dist-packages", "test", "tests", "idle_test")
    found, skipped = read_text_folder(Path(sysconfig.get_path("stdlib")), enter, suffix=".py",
                                      follow_links=False)
    return _split("stdlib", *_by_path(found), skipped)


def _folder(root: Path) -> Corpus:
    found, skipped = read_text_folder(root, enter_folder=lambda folder: not folder.startswith("."))
    return _split(str(root), *_by_path(found), skipped)


def _by_path(found):
    documents = [Document(path, text) for path, text in found]
    return documents, [_sha256(d.path) for d in documents]


def _file(path: Path) -> Corpus:
    pieces = [Document(f"{path.name}#{i}", piece) for i, piece
              in enumerate(split_text(read_text_file(path)), 1)]
    return _split(str(path), pieces, [_sha256(d.text) for d in pieces], [])


def split_text(text: str, piece_chars: int = _PIECE_CHARS) -> Iterator[str]:
    """Yield pieces that join to `text`, each of at least `piece_chars` characters but the last.

    A piece ends at the first blank line after that many characters, at any line end after twice as many, or
    in the middle of a line when there is no line end either.
    """
    size, start = piece_chars, 0
    while len(text) - start > size:
        blank = re.compile(r"\n[ \t\r]*\n+").search(text, start + size, start + 2 * size)
        line = text.find("\n", start + 2 * size, start + 4 * size)
        end = blank.end() if blank else line + 1 if line >= 0 else start + 2 * size
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _split(name: str, documents: list[Document], hashes: list[bytes], skipped: list[str]) -> Corpus:
    full = [(document, h) for document, h in zip(documents, hashes) if document.text]
    if not full:
        hint = f" (left out: {summarize_skip_reasons(skipped)})" if skipped else ""
        raise ValueError(f"the corpus {name} is empty{hint}; --data needs text: try --data stdlib")
    out = {h for h in hashes if int.from_bytes(h) % _HELD_OUT_EVERY == 0}
    if not 0 < sum(h in out for _, h in full) < len(full):
        out = {min(h for _, h in full)}      # too few documents for a twentieth: hold out the lowest hash
    if all(h in out for _, h in full):
        size = count_utf8_bytes(documents)
        raise ValueError(f"the corpus {name} has no held-out documents: its {size} bytes "
                         "make one document or equal ones, and training takes one and holding out another; "
                         f"give a file above {2 * _PIECE_CHARS} bytes, a folder of two files, or --data "
                         "stdlib")
    train, held_out = [], []
    for document, h in zip(documents, hashes):
        (held_out if h in out else train).append(document)
    return Corpus(name, tuple(train), tuple(held_out), tuple(skipped))


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
