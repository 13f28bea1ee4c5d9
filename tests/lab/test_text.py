import torch

from lessons.l01_memory.text_batches import BYTE_VOCAB, python_source_bytes, text_batch


def test_targets_are_the_next_bytes_and_a_batch_is_its_seeds():
    x, y = text_batch(3, B=2, T=10)
    assert x.shape == y.shape == (2, 10) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, text_batch(3, B=2, T=10)[0]) and not torch.equal(x, text_batch(4, B=2, T=10)[0])
    assert 0 <= int(python_source_bytes().min()) and int(python_source_bytes().max()) < BYTE_VOCAB


def test_it_is_the_source_of_inspect():
    first = bytes(python_source_bytes()[:200].tolist()).decode()
    assert first.startswith('"""Get useful information from live Python')
