"""An emulated wire: makes communication time visible, and predictable, on a laptop.

A collective on n ranks holds the link for T = steps * latency + ring bytes / bandwidth
(formulas/collectives.py), from the moment the last rank entered it and the link was free. Entry times travel
beside the data, so every rank computes the same timeline; a rank that waits sleeps until its end, so overlap
and exposed time are real. One host only: the ranks must share `time.monotonic`.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Link:
    """latency in s a message, bandwidth in bytes/s, one way. `free_at` is when the last transfer ends."""
    latency: float
    bandwidth: float
    free_at: float = 0.0

    def __post_init__(self):
        self.queue = []                      # collectives entered, not yet placed on the timeline, in order

    def seconds(self, op: str, payload: int, n: int) -> float:
        """How long `op` holds the link."""
        from nanoinfra.formulas.collectives import (
            ring_seconds,  # so that dist/ can be lifted without formulas/
        )

        return ring_seconds(op, payload, n, self.latency, self.bandwidth)

    def enter(self, op: str, payload: int, n: int, latest: Callable) -> "Transfer":
        """Queue a collective of `n` ranks; `latest(stamp)` starts to make `stamp` their last entry."""
        stamp = torch.tensor([time.monotonic()], dtype=torch.float64)
        self.queue.append(Transfer(stamp, latest(stamp), self.seconds(op, payload, n)))
        return self.queue[-1]

    def sleep_until_done(self, transfer: "Transfer") -> None:
        """Place all up to `transfer` on the timeline, in the order they were entered; sleep until its end."""
        while transfer.end is None:
            first = self.queue.pop(0)
            first.work.wait()
            self.free_at = first.end = max(first.stamp.item(), self.free_at) + first.seconds
        sleep_until(transfer.end)

    def depart(self, payload: int) -> torch.Tensor:
        """When a message sent now will have arrived; the receiver sleeps until then: (1,) float64 seconds."""
        self.free_at = max(time.monotonic(), self.free_at) + self.seconds("send", payload, 2)
        return torch.tensor([self.free_at], dtype=torch.float64)


@dataclass(eq=False)
class Transfer:
    """One collective on the link's timeline."""
    stamp: torch.Tensor                      # (1,) latest entry
    work: object                             # of the all-reduce that finds it
    seconds: float
    end: float | None = None


def sleep_until(moment: float) -> None:
    """Sleep to a `time.monotonic` moment; the last millisecond is spun, because sleep overshoots."""
    while (left := moment - time.monotonic()) > 0:
        time.sleep(max(0.0, left - 1e-3))
