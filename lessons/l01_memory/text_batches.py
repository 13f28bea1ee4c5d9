"""Training batches of real text for models that train in seconds: the source of Python's `inspect`, as
bytes."""
import functools
import inspect

import torch

BYTE_VOCAB = 128


@functools.cache
def python_source_bytes() -> torch.Tensor:
    """The source of `inspect` as token ids below 128."""
    return torch.tensor([byte for byte in inspect.getsource(inspect).encode() if byte < BYTE_VOCAB])


def text_batch(i: int, B: int = 4, T: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch i, drawn with seed i: inputs and targets (B, T), where a target is the byte that follows."""
    starts = torch.randint(len(python_source_bytes()) - T, (B, 1), generator=torch.Generator().manual_seed(i))
    window = python_source_bytes()[starts + torch.arange(T + 1)]                          # (B, T + 1)
    return window[:, :-1], window[:, 1:]
