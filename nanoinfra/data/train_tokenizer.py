"""Training of a byte-level BPE tokenizer on the train documents; AutoTokenizer can load its folder.

The 256 bytes and `<|endoftext|>` are always there, so every text has tokens and 257 is the smallest
vocabulary; each further entry merges the most frequent pair. Sennrich et al. 2016; over bytes: Radford et al.
2019 (GPT-2). Cached by corpus hash and vocabulary. Feeds token_datasets.py. Tokenizers of other models
are read by model/weights/hugging_face/tokenizer_files.py.
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
from nanoinfra.data.tokenizer_and_token_cache import get_or_build_folder

END_OF_TEXT_TOKEN = "<|endoftext|>"
_TOKENIZER_FILE, _CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
_MIN_VOCAB_SIZE = 257                               # 256 bytes and the end of text
MAX_TRAINING_WORD_BYTES = 256                           # bytes of a word that training looks at in one piece


def get_or_train_tokenizer(corpus: Corpus, vocab_size: int = 4096, cache: str | Path
                           | None = None) -> "BPETokenizer":
    """Return the tokenizer of `vocab_size` entries trained on `corpus.train`, from the cache if it is there.

    `.train_seconds` is the time that its training took here, 0.0 from the cache. Several ranks may call this
    at once: all get the same one. Raises ValueError for a vocabulary below 257.
    """
    took = []

    def write_files(folder: Path) -> None:
        begin = time.perf_counter()
        BPETokenizer.train((document.text for document in corpus.train), vocab_size).save(folder)
        took.append(time.perf_counter() - begin)

    _check_vocab_size(vocab_size)
    name = f"tokenizer-{corpus.sha256[:16]}-{vocab_size}"
    got = BPETokenizer.load(get_or_build_folder(name, write_files, cache))
    got.train_seconds = sum(took, 0.0)
    return got


class BPETokenizer:
    """A tokenizer: text to ids and back. `vocab_size` counts every id; `eot_token_id` ends a document.

    Raises ValueError when `backend_tokenizer` has no token named `eot_token`.
    """

    def __init__(self, backend_tokenizer: tokenizers.Tokenizer, eot_token: str = END_OF_TEXT_TOKEN):
        eot_token_id = backend_tokenizer.token_to_id(eot_token)
        if eot_token_id is None:
            raise ValueError(f"the tokenizer has no token {eot_token!r} to end a document with; name the "
                             "one it has as eos_token in tokenizer_config.json")
        self.backend_tokenizer = backend_tokenizer
        self.eot_token, self.eot_token_id = eot_token, eot_token_id
        self.vocab_size = backend_tokenizer.get_vocab_size(with_added_tokens=True)
        self.train_seconds = 0.0                   # seconds spent training it in this process

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn `vocab_size` entries from `texts`; fewer when no further pair of tokens repeats.

        A merge costs the whole length of each word it occurs in, so a word of n bytes costs n^2. A run of
        letters, signs or spaces may be a whole file: training looks at it in parts, encoding in one piece,
        which takes n log n.
        """
        _check_vocab_size(vocab_size)
        backend = tokenizers.Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words,
                                                         pre_tokenizers.FixedLength(MAX_TRAINING_WORD_BYTES)])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT_TOKEN], initial_alphabet=alphabet,
            show_progress=False))
        backend.pre_tokenizer = words
        return cls(backend)

    @staticmethod
    def is_saved_here(folder: str | Path) -> bool:
        """Whether `folder` holds exactly the files that `save` writes."""
        names = (path.name for path in Path(folder).glob("*"))
        config = _read(folder)
        return sorted(names) == [_TOKENIZER_FILE, _CONFIG_FILE] and config == _config(config.get("eos_token"))

    @classmethod
    def load(cls, folder: str | Path) -> "BPETokenizer":
        """Load the tokenizer that `save` wrote into `folder`. Raises ValueError when it holds another one."""
        if not cls.is_saved_here(folder):
            raise ValueError(f"{folder} holds no tokenizer saved by nanoinfra; train one, or name the model "
                             "it belongs to as --model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(Path(folder, _TOKENIZER_FILE)))
        except Exception as error:           # the package has no other kind
            raise ValueError(f"{folder}/{_TOKENIZER_FILE} is not what was saved: {error}") from error
        return cls(backend, _read(folder)["eos_token"])

    @property
    def sha256(self) -> str:
        """SHA-256 of tokenizer.json, in hexadecimal."""
        return hashlib.sha256(self.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str, parse_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`, with nothing added.

        `<|endoftext|>` spelled out in a text is plain text, so that no document can end itself; with
        `parse_special_tokens` it becomes its id, as transformers does and chat templates need.
        """
        return self.encode_batch([text], parse_special_tokens)[0]

    def encode_batch(self, texts: list[str], parse_special_tokens: bool = False) -> list[list[int]]:
        """Encode each text, on all cores."""
        backend = self.backend_tokenizer if parse_special_tokens else self._plain
        return [got.ids for got in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, which is made if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, _TOKENIZER_FILE).write_text(self.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        Path(folder, _CONFIG_FILE).write_text(json.dumps(_config(self.eot_token), indent=2), encoding="utf-8")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # a copy: threads may use both at once
        plain = tokenizers.Tokenizer.from_str(self.backend_tokenizer.to_str())
        plain.encode_special_tokens = True                              # as ordinary text
        return plain


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < _MIN_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the end of text; "
                         f"try --vocab {_MIN_VOCAB_SIZE} or more")


def _config(end_of_text):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end_of_text,
            "bos_token": end_of_text, "clean_up_tokenization_spaces": False}


def _read(folder):
    try:
        found = json.loads(Path(folder, _CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):            # none of ours, whatever it is
        return {}
    return found if isinstance(found, dict) else {}
