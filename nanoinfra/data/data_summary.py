"""What a run says of its data before it begins: what was read, what was left out and why, what it makes.

Nothing is dropped in silence: a file that is no text, tokens that no sample holds, a held-out side larger
than the one trained on.
"""
from nanoinfra.data.corpus import Corpus
from nanoinfra.data.sample_order import Packed
from nanoinfra.data.text_files import reasons


def describe_data(source: Packed, seq: int) -> str:
    """One line: documents, bytes and tokens on each side of the split, and the samples of an epoch."""
    corpus, tokens = source.corpus, len(source.tokens)
    train, held_out = corpus.bytes
    windows = source.windows(seq)
    over = f", the last {over:,} are in none" if (over := tokens - 1 - windows * seq) else ""
    return (f"--data {corpus.name}: {len(corpus.train)} documents ({_size(train)}) to train on, "
            f"{len(corpus.held_out)} ({_size(held_out)}) held out; "
            f"{tokens:,} tokens make {windows:,} samples of {seq}{over}")


def data_warnings(source: Packed, seq: int, vocab: int | None, global_batch: int) -> list[str]:
    """A line for each thing that may not be meant. `vocab` is the size asked for, None where none was."""
    corpus, windows = source.corpus, source.windows(seq)
    train, held_out = corpus.bytes
    found = []
    if corpus.skipped:
        found.append(left_out(corpus))
    if held_out > train:
        found.append(f"--data {corpus.name} holds out {_size(held_out)}, more than the {_size(train)} to "
                     "train on: a file's name decides its side; give one file, which is cut, or more files")
    if vocab and source.tokenizer.vocab_size < vocab:
        found.append(f"the vocabulary has {source.tokenizer.vocab_size} entries of the {vocab} wanted: no "
                     "further pair of them repeats in the text")
    if windows < global_batch:
        found.append(f"a step takes {global_batch} samples and --data {corpus.name} has {windows} of "
                     f"{seq} tokens: some come more than once in it; try a smaller --seq, or more text")
    return found


def left_out(corpus: Corpus) -> str:
    """How many files were read and how many left out, for which reasons."""
    read = len(corpus.train) + len(corpus.held_out)
    encoding = any("UTF-" in reason for _, reason in corpus.skipped)
    return (f"--data {corpus.name}: {read} files are read, {len(corpus.skipped)} are left out: "
            f"{reasons(corpus.skipped)}" + "; iconv turns other encodings into UTF-8" * encoding)


def _size(count):
    return next((f"{count / unit:.1f} {name}" for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))
                 if count >= unit), f"{count} bytes")
