"""Deals one global order of samples to data-parallel ranks: a step's samples are the same on every mesh.

The step at cursor c takes samples c .. c+G-1; sample i of them goes to rank i mod dp, which cuts its share
into m = ceil(G / (M dp)) micro-batches of M. Short ones stay short; an empty one is a row of ignored targets,
because every rank enters every collective. The state is one integer, the samples the trainer has consumed,
and the seed. G samples a step, M in a micro-batch, b <= M in this one, T tokens. Ranks of one tp, cp, pp
group share a dp rank.
"""
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import log

import numpy as np
import torch

from nanoinfra.data.corpus import Document, utf8_bytes
from nanoinfra.data.sample_order import IGNORE, Packed, Random
from nanoinfra.data.train_tokenizer import Tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]                # x (b, T), y (b, T), int64


class Loader:
    """Micro-batches of one dp rank, step after step, made ahead in a background thread."""

    def __init__(self, source: Packed | Random, *, seed: int, seq: int, global_batch: int | None = None,
                 micro_batch: int, dp_rank: int = 0, dp_size: int = 1, start: int = 0, prefetch: int = 2):
        """`start` is the cursor to go on from; `global_batch` defaults to micro_batch x dp_size.

        Raises ValueError for sizes below 1, a negative seed or cursor, and a sequence longer than the corpus.
        """
        global_batch = micro_batch * dp_size if global_batch is None else global_batch
        for flag, value, least in (("--seq", seq, 1), ("--micro-batch", micro_batch, 1), ("--seed", seed, 0),
                                   ("--global-batch", global_batch, 1), ("start", start, 0),
                                   ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"{flag} is {value}; it must be at least {least}: try {flag} {least}")
        source.check(seq)
        self.source, self.seed, self.seq = source, seed, seq
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size, self.consumed = dp_rank, dp_size, start
        self.prefetch, self.pending = prefetch, deque()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def next(self) -> list[Batch]:
        """The m micro-batches of the next optimizer step. What went wrong in the thread is raised here."""
        while len(self.pending) < self.prefetch:
            ahead = self.consumed + len(self.pending) * self.global_batch
            self.pending.append(self.pool.submit(self.batches, ahead))
        batches = self.pending[0].result()
        self.pending.popleft()
        self.consumed += self.global_batch
        return batches

    def batches(self, cursor: int) -> list[Batch]:
        """The micro-batches of the step whose first sample is `cursor`."""
        rows = deal(self.global_batch, self.micro_batch, self.dp_rank, self.dp_size)
        return [_stack([self.source.sample(cursor + i, self.seed, self.seq) for i in some], self.seq)
                for some in rows]

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: samples consumed (what was made ahead does not count) and the seed."""
        return {"consumed": self.consumed, "seed": self.seed}

    def close(self) -> None:
        """End the thread; `next` afterwards raises RuntimeError."""
        self.pool.shutdown(cancel_futures=True)
        self.pending.clear()


def deal(count: int, micro_batch: int, rank: int, size: int) -> list[range]:
    """Which of `count` items each of this rank's micro-batches holds; as many micro-batches on every rank."""
    share = range(rank, count, size)
    m = -(-count // (micro_batch * size))
    return [share[k * micro_batch:(k + 1) * micro_batch] for k in range(m)]


class HeldOut:
    """Held-out documents as windows of T: each from its start, end of text as first input and last target.

    `rows` are the windows' x and y, (T,) int64 each, padded with 0 and IGNORE; `tokens` counts targets,
    `bytes` the UTF-8 bytes of the documents.
    """

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seq: int):
        self.seq, self.rows, eot = seq, [], tokenizer.eot
        for ids in tokenizer.encode_all([document.text for document in documents]):
            s = [eot, *ids, eot]
            self.rows += [_padded(s[i:i + seq + 1], seq) for i in range(0, len(s) - 1, seq)]
        self.tokens = sum(int((y != IGNORE).sum()) for _, y in self.rows)
        self.bytes = utf8_bytes(documents)

    def batches(self, micro_batch: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Window i goes to rank i mod `size`; as many batches on every rank, dealt as in training."""
        for some in deal(len(self.rows), micro_batch, rank, size):
            yield _stack([self.rows[i] for i in some], self.seq)

    def bits_per_byte(self, nats: float) -> float:
        """-sum log2 p / bytes, from -sum ln p over all held-out tokens of all ranks."""
        return nats / log(2) / self.bytes


def _padded(s: list[int], seq: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.zeros(seq, np.int64), np.full(seq, IGNORE)
    x[:len(s) - 1], y[:len(s) - 1] = s[:-1], s[1:]
    return x, y


def _stack(rows: list[tuple[np.ndarray, np.ndarray]], seq: int) -> Batch:
    rows = rows or [(np.zeros(seq, np.int64), np.full(seq, IGNORE))]
    x, y = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    return x, y                                          # (b, T), (b, T)
