"""Byte-level BPE, trained on the train documents alone; its folder is one that AutoTokenizer loads.

The 256 bytes and `<|endoftext|>` are always there, so every text has tokens and 257 is the smallest
vocabulary; each further entry merges the most frequent pair. Sennrich et al. 2016; over bytes: Radford et al.
2019 (GPT-2). Cached by corpus hash and vocabulary. Feeds source.py. What comes with other models is read by
model/weights/hugging_face/tokenizer_files.py.
"""
import hashlib
import json
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanoinfra.data.corpus import Corpus
from nanoinfra.data.token_cache import cached_folder

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, CONFIG = "tokenizer.json", "tokenizer_config.json"
SMALLEST = 257                               # 256 bytes and the end of text
LONGEST_WORD = 256                           # bytes of a word that training looks at in one piece


def tokenizer_for(corpus: Corpus, vocab: int = 4096, cache: str | Path | None = None) -> "Tokenizer":
    """The tokenizer of `vocab` entries trained on `corpus.train`, from the cache where it is there.

    `.train_s` is the time its training took here, 0.0 where it came from the cache. Several ranks may call
    this at once: all get the same one. Raises ValueError for a vocabulary below 257.
    """
    took = []

    def fill(folder: Path) -> None:
        begin = time.perf_counter()
        Tokenizer.train((document.text for document in corpus.train), vocab).save(folder)
        took.append(time.perf_counter() - begin)

    _check_vocab(vocab)
    got = Tokenizer.load(cached_folder(f"tokenizer-{corpus.hash[:16]}-{vocab}", fill, cache))
    got.train_s = sum(took, 0.0)
    return got


class Tokenizer:
    """Text to ids and back. `vocab_size` counts every id, `eot` is the id that ends a document.

    Raises ValueError where `backend` has no token named `end_of_text`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_text: str = END_OF_TEXT):
        eot = backend.token_to_id(end_of_text)
        if eot is None:
            raise ValueError(f"the tokenizer has no token {end_of_text!r} to end a document with; name the "
                             "one it has as eos_token in tokenizer_config.json")
        self.backend, self.end_of_text, self.eot = backend, end_of_text, eot
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.train_s = 0.0                   # seconds spent training it in this process

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> "Tokenizer":
        """Learn `vocab` entries from `texts`; fewer where the texts have no more pairs that repeat.

        A merge costs the whole length of each word it occurs in, so a word of n bytes costs n^2. A run of
        letters, signs or spaces may be a whole file: it is learned from in parts, and encoded in one piece,
        which takes n log n.
        """
        _check_vocab(vocab)
        backend = tokenizers.Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False))
        backend.pre_tokenizer = words
        return cls(backend)

    @staticmethod
    def is_own(folder: str | Path) -> bool:
        """Does `folder` hold what `save` writes, and nothing beside it that would change what it means?"""
        names = (path.name for path in Path(folder).glob("*"))
        config = _read(folder)
        return sorted(names) == [VOCABULARY, CONFIG] and config == _config(config.get("eos_token"))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer saved in `folder`. Raises ValueError where it holds none that was trained here."""
        if not cls.is_own(folder):
            raise ValueError(f"{folder} holds no tokenizer saved by nanoinfra; train one, or name the model "
                             "it belongs to as --model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(Path(folder, VOCABULARY)))
        except Exception as error:           # the package has no other kind
            raise ValueError(f"{folder}/{VOCABULARY} is not what was saved: {error}") from error
        return cls(backend, _read(folder)["eos_token"])

    @property
    def hash(self) -> str:
        """SHA-256 of tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Ids of `text`, with nothing added.

        `<|endoftext|>` spelled out in a text is plain text, so that no document can end itself; with
        `specials` such names become their ids, as transformers does and chat templates want.
        """
        return self.encode_all([text], specials)[0]

    def encode_all(self, texts: list[str], specials: bool = False) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        backend = self.backend if specials else self._plain
        return [got.ids for got in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, made if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, VOCABULARY).write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        Path(folder, CONFIG).write_text(json.dumps(_config(self.end_of_text), indent=2), encoding="utf-8")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())    # a copy: threads may use both at once
        plain.encode_special_tokens = True                              # as ordinary text
        return plain


def _check_vocab(vocab: int) -> None:
    if vocab < SMALLEST:
        raise ValueError(f"a vocabulary of {vocab} cannot hold the 256 bytes and the end of text; "
                         f"try --vocab {SMALLEST} or more")


def _config(end_of_text):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text,
            "bos_token": end_of_text, "clean_up_tokenization_spaces": False}


def _read(folder):
    try:
        found = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):            # none of ours, whatever it is
        return {}
    return found if isinstance(found, dict) else {}
