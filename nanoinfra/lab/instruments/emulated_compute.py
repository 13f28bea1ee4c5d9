"""Emulate an accelerator's compute time: modules sleep for as long as it would compute.

Ranks that share two cores cannot compute at the same time, but they can sleep at the same time. Together with
an emulated link (distributed/emulated_link.py), overlap and exposed waiting are predictable on any laptop.
"""
import time
from collections.abc import Iterable

import torch
from torch import nn


def emulate_compute_time(modules: Iterable[nn.Module],
                         backward_seconds_per_sample: float) -> list[tuple[float, float]]:
    """Make each module sleep for that long per sample of its output in backward, and half as long in forward.

    The module's real work comes on top. Returns a list that fills with (begin, end) of each sleep in
    backward, in `time.monotonic` seconds. A module sleeps before its own gradients are computed.
    """
    naps = []
    for module in modules:
        module.register_forward_hook(
            lambda _, __, out: _Nap.apply(out, backward_seconds_per_sample * len(out), naps))
    return naps


class _Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds, naps):
        ctx.seconds, ctx.naps = seconds, naps
        time.sleep(seconds / 2)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        begin = time.monotonic()
        time.sleep(ctx.seconds)
        ctx.naps.append((begin, time.monotonic()))
        return upstream, None, None
