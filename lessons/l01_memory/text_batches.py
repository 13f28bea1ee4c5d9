"""Real text for models that train in seconds: the source of Python's `inspect`, byte by byte."""
import functools
import inspect

import torch

VOCAB = 128


@functools.cache
def text() -> torch.Tensor:
    """All of it, as bytes below 128."""
    return torch.tensor([byte for byte in inspect.getsource(inspect).encode() if byte < VOCAB])


def batch(i: int, B: int = 4, T: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The i-th batch, drawn from seed i: x, y (B, T), bytes and the bytes that follow."""
    starts = torch.randint(len(text()) - T, (B, 1), generator=torch.Generator().manual_seed(i))
    window = text()[starts + torch.arange(T + 1)]                          # (B, T + 1)
    return window[:, :-1], window[:, 1:]
