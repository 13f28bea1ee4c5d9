"""The data loader: it deals one global order of samples to data-parallel ranks, the same on every mesh.

The step that begins at sample c takes samples c .. c+G-1; the i-th of them goes to rank i mod dp, which makes
m = ceil(G / (M dp)) micro-batches of M (gradient accumulation). Short ones stay short; an empty one is a row
of ignored targets, because every rank enters every collective. The state is the number of samples consumed,
and the seed. G samples a step, M in a micro-batch, b <= M in this one, T tokens. Ranks of one tp, cp, pp
group share a dp rank.
"""
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import log

import numpy as np
import torch

from nanoinfra.data.batch import Batch
from nanoinfra.data.corpus import Document, count_utf8_bytes
from nanoinfra.data.token_datasets import IGNORE_INDEX, PackedDataset, RandomTokenDataset
from nanoinfra.data.train_tokenizer import BPETokenizer


class MicroBatchLoader:
    """The micro-batches of one data-parallel rank, step after step, prefetched by a background thread."""

    def __init__(self, dataset: PackedDataset | RandomTokenDataset, *, seed: int, seq_len: int,
                 global_batch: int | None = None, micro_batch: int, dp_rank: int = 0, dp_size: int = 1,
                 first_sample: int = 0, prefetch_steps: int = 2):
        """`first_sample` is the global sample to start at; `global_batch` defaults to micro_batch x dp_size.

        Raises ValueError for sizes below 1, a negative seed or sample, or a sequence longer than the corpus.
        """
        global_batch = micro_batch * dp_size if global_batch is None else global_batch
        for flag, value, least in (("--seq", seq_len, 1), ("--micro-batch", micro_batch, 1),
                                   ("--seed", seed, 0), ("--global-batch", global_batch, 1),
                                   ("first_sample", first_sample, 0), ("prefetch_steps", prefetch_steps, 1)):
            if value < least:
                raise ValueError(f"{flag} is {value}; it must be at least {least}: try {flag} {least}")
        dataset.check_seq_len(seq_len)
        self.dataset = dataset
        self.seed, self.seq_len = seed, seq_len
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.consumed = first_sample
        self.prefetch_steps, self._prefetched = prefetch_steps, deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    def next_step(self) -> list[Batch]:
        """Return the m micro-batches of the next optimizer step; errors of the thread are raised here."""
        while len(self._prefetched) < self.prefetch_steps:
            ahead = self.consumed + len(self._prefetched) * self.global_batch
            self._prefetched.append(self._thread.submit(self.micro_batches_at, ahead))
        batches = self._prefetched[0].result()
        self._prefetched.popleft()
        self.consumed += self.global_batch
        return batches

    def micro_batches_at(self, first_sample: int) -> list[Batch]:
        """Make the micro-batches of the step that begins at the global sample `first_sample`."""
        rows = deal_to_micro_batches(self.global_batch, self.micro_batch, self.dp_rank, self.dp_size)
        return [_stack([self.dataset.get_sample(first_sample + i, self.seed, self.seq_len) for i in some],
                       self.seq_len)
                for some in rows]

    def state_dict(self) -> dict[str, int]:
        """The samples consumed, without those prefetched, and the seed: what a checkpoint keeps."""
        return {"consumed": self.consumed, "seed": self.seed}

    def close(self) -> None:
        """End the thread; `next_step` then raises RuntimeError."""
        self._thread.shutdown(cancel_futures=True)
        self._prefetched.clear()


def deal_to_micro_batches(count: int, micro_batch: int, rank: int, size: int) -> list[range]:
    """Return the items, of 0 .. count-1, in each micro-batch of this rank; all ranks get as many of them."""
    share = range(rank, count, size)
    m = -(-count // (micro_batch * size))
    return [share[k * micro_batch:(k + 1) * micro_batch] for k in range(m)]


class HeldOutSet:
    """Held-out documents as windows of T tokens, to evaluate the loss in bits per byte.

    Each document starts a window of its own, with end of text as the first input and the last target.
    `windows` are pairs of tokens and targets, (T,) int64 each, padded with 0 and IGNORE_INDEX; `num_targets`
    counts the targets, `num_bytes` the UTF-8 bytes of the documents.
    """

    def __init__(self, documents: list[Document], tokenizer: BPETokenizer, seq_len: int):
        self.seq_len, self.windows = seq_len, []
        eot = tokenizer.eot_token_id
        for ids in tokenizer.encode_batch([document.text for document in documents]):
            s = [eot, *ids, eot]
            self.windows += [_padded(s[i:i + seq_len + 1], seq_len) for i in range(0, len(s) - 1, seq_len)]
        self.num_targets = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in self.windows)
        self.num_bytes = count_utf8_bytes(documents)

    def micro_batches(self, micro_batch: int, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Yield this rank's micro-batches: window i goes to rank i mod `size`, as many on every rank."""
        for some in deal_to_micro_batches(len(self.windows), micro_batch, rank, size):
            yield _stack([self.windows[i] for i in some], self.seq_len)

    def bits_per_byte(self, total_nats: float) -> float:
        """Convert -sum ln p over all held-out targets of all ranks into bits per byte of text."""
        return total_nats / log(2) / self.num_bytes


def _padded(s: list[int], seq: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.zeros(seq, np.int64), np.full(seq, IGNORE_INDEX)
    x[:len(s) - 1], y[:len(s) - 1] = s[:-1], s[1:]
    return x, y


def _stack(rows: list[tuple[np.ndarray, np.ndarray]], seq: int) -> Batch:
    rows = rows or [(np.zeros(seq, np.int64), np.full(seq, IGNORE_INDEX))]
    return Batch(*(torch.from_numpy(np.stack(part)) for part in zip(*rows)))         # (b, T) each
