"""The figure of lesson 04: the bytes of each tensor that autograd saves in a layer."""
from collections.abc import Sequence

import torch

from nanoinfra.lab.draw import BLUE, GREEN, ORANGE, Picture, new_figure


def saved_tensor_bars(tensors: Sequence[torch.Tensor], names: Sequence[str], seq: int, title: str) -> Picture:
    """Bars of the bytes of `tensors`: the first in green, (seq, seq) in orange. ValueError if a name is
    missing."""
    picture, axes = new_figure(8.6, 1 + 0.29 * len(tensors), title)
    labels = [f"{name}  {tuple(tensor.shape)}" for name, tensor in zip(names, tensors, strict=True)]
    for row, tensor in enumerate(tensors):
        colour = ORANGE if tensor.shape[-2:] == (seq, seq) else BLUE
        axes.barh(row, tensor.nbytes / 1e3, 0.72, color=colour if row else GREEN)
        axes.text(tensor.nbytes / 1e3, row, f" {tensor.nbytes:,} B", va="center", fontsize=9)
    axes.set_yticks(range(len(tensors)), labels, fontsize=9)
    axes.set(xlabel="kB, counted", xlim=(0, 1.15 * axes.get_xlim()[1]), ylim=(len(tensors) - 0.4, -0.6))
    axes.grid(False, axis="y")
    return picture
