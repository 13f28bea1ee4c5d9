"""Messages on the data before a run begins: what was read, what was left out and why, how many samples.

They report files that are no text, tokens that are in no sample, and a held-out side that is larger than the
train side.
"""
from nanoinfra.data.corpus import Corpus
from nanoinfra.data.read_text_files import summarize_skip_reasons
from nanoinfra.data.token_datasets import PackedDataset


def describe_data(dataset: PackedDataset, seq_len: int) -> str:
    """Describe in one line the documents and bytes of both sides of the split, tokens and samples."""
    corpus, tokens = dataset.corpus, len(dataset.tokens)
    train, held_out = corpus.train_and_held_out_bytes
    windows = dataset.samples_per_epoch(seq_len)
    over = f", the last {over:,} are in none" if (over := tokens - 1 - windows * seq_len) else ""
    return (f"--data {corpus.name}: {len(corpus.train)} documents ({_size(train)}) to train on, "
            f"{len(corpus.held_out)} ({_size(held_out)}) held out; "
            f"{tokens:,} tokens make {windows:,} samples of {seq_len}{over}")


def data_warnings(dataset: PackedDataset, seq_len: int, vocab_size: int | None,
                  global_batch: int) -> list[str]:
    """Return a warning for each likely mistake; `vocab_size` is the --vocab that was asked for, if any."""
    corpus, windows = dataset.corpus, dataset.samples_per_epoch(seq_len)
    train, held_out = corpus.train_and_held_out_bytes
    found = []
    if corpus.skipped:
        found.append(_describe_skipped(corpus))
    if held_out > train:
        found.append(f"--data {corpus.name} holds out {_size(held_out)}, more than the {_size(train)} to "
                     "train on: a file's name decides its side; give one file, which is cut, or more files")
    if vocab_size and dataset.tokenizer.vocab_size < vocab_size:
        found.append(f"the vocabulary has {dataset.tokenizer.vocab_size} entries of the {vocab_size} wanted: "
                     "no further pair of them repeats in the text")
    if windows < global_batch:
        found.append(f"a step takes {global_batch} samples and --data {corpus.name} has {windows} of "
                     f"{seq_len} tokens: some come more than once in it; try a smaller --seq, or more text")
    return found


def _describe_skipped(corpus: Corpus) -> str:
    """How many files were read, how many were left out, and for which reasons."""
    read = len(corpus.train) + len(corpus.held_out)
    encoding = any("UTF-" in reason for _, reason in corpus.skipped)
    return (f"--data {corpus.name}: {read} files are read, {len(corpus.skipped)} are left out: "
            f"{summarize_skip_reasons(corpus.skipped)}"
            + "; iconv turns other encodings into UTF-8" * encoding)


def _size(count):
    return next((f"{count / unit:.1f} {name}" for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
                 if count >= unit), f"{count} bytes")
