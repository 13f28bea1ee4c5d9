"""A corpus of 60 small files with awkward ones among them, and all that is made from it."""
import pytest

from nanoinfra.data.corpus import load_corpus
from nanoinfra.data.sample_order import pack
from nanoinfra.data.train_tokenizer import tokenizer_for


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (root / f"d{i % 3}").mkdir(exist_ok=True)
        text = f"def f{i}(x):\n    return x * {i}\n\n" * (1 + i % 7) + "naïve 日本 \t\r\n" * (i % 2)
        (root / f"d{i % 3}" / f"{i}.py").write_text(text, newline="")
    (root / "empty.py").write_text("")
    (root / "ends_itself.py").write_text("x = '<|endoftext|>'\n")
    return root


@pytest.fixture(scope="session")
def corpus(folder):
    return load_corpus(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tokenizer(corpus, cache):
    return tokenizer_for(corpus, 300, cache)


@pytest.fixture(scope="session")
def packed(corpus, tokenizer, cache):
    return pack(corpus, tokenizer, cache)
