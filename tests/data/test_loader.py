import threading
from math import ceil, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.data.corpus import Document
from nanoinfra.data.micro_batch_loader import HeldOutSet, MicroBatchLoader, deal_to_micro_batches
from nanoinfra.data.token_datasets import IGNORE_INDEX, PackedDataset, RandomTokenDataset
from nanoinfra.data.train_tokenizer import BPETokenizer

BYTES = BPETokenizer.train(["a"], 257)
PACKED = PackedDataset(np.arange(1 + 4 * 23), np.array([1]))         # 23 windows of 4
SOURCES = st.sampled_from([PACKED, RandomTokenDataset(257)])


class Watched(RandomTokenDataset):
    """Tells which samples were made, in which thread; sample `bad` cannot be."""
    def __init__(self, bad=None):
        super().__init__(257)
        self.bad, self.made, self.threads, self.ahead = bad, [], set(), threading.Event()

    def get_sample(self, g, seed, seq):
        if g == self.bad:
            raise OSError(f"sample {g} is gone")
        self.made.append(g)
        self.threads.add(threading.current_thread().name)
        if g >= 8:
            self.ahead.set()
        return super().get_sample(g, seed, seq)


def steps(count, **given):
    loader = MicroBatchLoader(**{"dataset": PACKED, "seed": 0, "seq_len": 4, "micro_batch": 2, **given})
    try:
        return [loader.next_step() for _ in range(count)]
    finally:
        loader.close()


def rows(batches):
    """The samples of micro-batches, without the rows that hold no target."""
    return [(tuple(x.tolist()), tuple(y.tolist())) for batch in batches for x, y in zip(*batch[:2])
            if (y != IGNORE_INDEX).any()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(p, q) for s, t in zip(a, b) for m, n in zip(s, t, strict=True)
                                    for p, q in zip(m[:2], n[:2], strict=True))


@settings(deadline=None, max_examples=60)
@given(source=SOURCES, dp=st.integers(1, 6), micro=st.integers(1, 4), batch=st.integers(1, 17),
       start=st.integers(0, 60), seed=st.integers(0, 2**40))
def test_a_step_is_the_same_samples_on_any_mesh(source, dp, micro, batch, start, seed):
    given = {"dataset": source, "seed": seed, "global_batch": batch, "first_sample": start}
    want = [[tuple(map(tuple, source.get_sample(start + k * batch + i, seed, 4))) for i in range(batch)]
            for k in range(2)]
    ranks = [steps(2, micro_batch=micro, dp_rank=r, dp_size=dp, **given) for r in range(dp)]
    for k in range(2):
        got = [rows(rank[k]) for rank in ranks]
        assert [got[i % dp][i // dp] for i in range(batch)] == want[k]
        assert sum(map(len, got)) == batch
        assert {len(rank[k]) for rank in ranks} == {ceil(batch / (micro * dp))}
        for x, y, *more in (batch for rank in ranks for batch in rank[k]):
            assert 1 <= len(x) <= micro and x.shape == y.shape == (len(x), 4) and more == [None] * 3


def test_an_uneven_batch_is_dealt_in_turn():
    got = [list(map(list, deal_to_micro_batches(7, 2, r, 3))) for r in range(3)]
    assert got == [[[0, 3], [6]], [[1, 4], []], [[2, 5], []]]
    assert [list(map(list, deal_to_micro_batches(2, 1, r, 3))) for r in range(3)] == [[[0]], [[1]], [[]]]


def test_an_empty_micro_batch_is_a_row_without_targets():
    (x, y, *_), = steps(1, global_batch=2, micro_batch=3, dp_rank=2, dp_size=3)[0]
    assert x.tolist() == [[0] * 4] and y.tolist() == [[IGNORE_INDEX] * 4]
    assert x.dtype == y.dtype == torch.int64


def test_the_global_batch_defaults_to_a_micro_batch_on_each_rank():
    got = [steps(1, micro_batch=3, dp_rank=r, dp_size=2)[0] for r in range(2)]
    assert [[tuple(batch.tokens.shape) for batch in micro] for micro in got] == [[(3, 4)], [(3, 4)]]


def test_an_epoch_deals_every_window_once():
    got = [row for step in steps(23, global_batch=2, first_sample=0) for row in rows(step)]
    assert sorted(got[:23]) == sorted(got[23:]) == sorted(set(got)) and got[:23] != got[23:]


@settings(deadline=None, max_examples=20)
@given(source=SOURCES, prefetch=st.integers(1, 4), done=st.integers(0, 5), batch=st.integers(1, 9))
def test_resume_goes_on_from_what_was_consumed(source, prefetch, done, batch):
    given = {"dataset": source, "global_batch": batch, "dp_rank": 1, "dp_size": 2}
    want = steps(done + 3, seed=9, **given)
    loader = MicroBatchLoader(seed=9, seq_len=4, micro_batch=2, prefetch_steps=prefetch, **given)
    for _ in range(done):
        loader.next_step()
    state = loader.state_dict()
    loader.close()
    assert state == {"consumed": done * batch, "seed": 9}
    got = steps(3, seed=state["seed"], first_sample=state["consumed"], prefetch_steps=prefetch, **given)
    assert same(got, want[done:])


def test_batches_are_made_ahead_in_a_thread():
    source = Watched()
    loader = MicroBatchLoader(source, seed=0, seq_len=4, micro_batch=4, prefetch_steps=3)
    loader.next_step()
    assert source.ahead.wait()                      # samples 8.. belong to the third step
    assert source.threads == {"loader_0"} and loader.state_dict()["consumed"] == 4
    loader.close()
    assert source.made == list(range(12))


def test_an_error_in_the_thread_is_raised_by_next_until_closed():
    loader = MicroBatchLoader(Watched(bad=9), seed=0, seq_len=4, micro_batch=4)
    loader.next_step(), loader.next_step()
    for _ in range(2):
        with pytest.raises(OSError, match="sample 9 is gone"):
            loader.next_step()
    assert loader.state_dict()["consumed"] == 8
    loader.close()


def test_close_ends_the_thread():
    loader = MicroBatchLoader(PACKED, seed=0, seq_len=4, micro_batch=1)
    loader.next_step()
    thread, = loader._thread._threads
    loader.close()
    loader.close()
    assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        loader.next_step()


@pytest.mark.parametrize("given, match", [
    ({"seq_len": 93}, "--seq 93 takes 94 tokens, the corpus has 93 .* try --seq 92,"),
    ({"seq_len": 0}, "--seq is 0; it must be at least 1"),
    ({"micro_batch": 0}, "--micro-batch is 0; it must be at least 1: try --micro-batch 1"),
    ({"global_batch": 0}, "--global-batch is 0"),
    ({"seed": -1}, "--seed is -1; it must be at least 0"),
    ({"first_sample": -1}, "first_sample is -1"),
    ({"prefetch_steps": 0}, "prefetch_steps is 0"),
])
def test_sizes_that_cannot_be(given, match):
    with pytest.raises(ValueError, match=match):
        MicroBatchLoader(**{"dataset": PACKED, "seed": 0, "seq_len": 4, "micro_batch": 2, **given})


def test_held_out_documents_start_afresh_and_end():
    e, (a, b, c, d) = BYTES.eot_token_id, BYTES.encode("abcd")
    got = HeldOutSet([Document("1", "abcd"), Document("2", ""), Document("3", "ab")], BYTES, seq_len=3)
    (x, y, *_), = got.micro_batches(micro_batch=9)
    assert x.tolist() == [[e, a, b], [c, d, 0], [e, 0, 0], [e, a, b]]
    assert y.tolist() == [[a, b, c], [d, e, IGNORE_INDEX], [e, IGNORE_INDEX, IGNORE_INDEX], [a, b, e]]
    assert (got.num_targets, got.num_bytes) == (4 + 2 + 3, 6)
    assert got.bits_per_byte(got.num_targets * log(2) * 8) == pytest.approx(9 * 8 / 6)


def test_bytes_are_those_of_utf8():
    got = HeldOutSet([Document("1", "日本")], BYTES, seq_len=4)
    assert (got.num_bytes, got.num_targets) == (6, 7)


@pytest.mark.parametrize("size, micro", [(1, 1), (2, 3), (5, 2), (7, 64)])
def test_held_out_windows_are_dealt_once(corpus, tokenizer, size, micro):
    held_out = HeldOutSet(corpus.held_out, tokenizer, seq_len=16)
    ranks = [list(held_out.micro_batches(micro, rank, size)) for rank in range(size)]
    assert {len(rank) for rank in ranks} == {ceil(len(held_out.windows) / (micro * size))}
    want = [(tuple(x), tuple(y)) for x, y in held_out.windows]
    got = [rows(rank) for rank in ranks]
    assert [got[i % size][i // size] for i in range(len(want))] == want
    assert sum(map(len, got)) == len(want)
    assert sum(batch.num_valid_targets for rank in ranks for batch in rank) == held_out.num_targets
