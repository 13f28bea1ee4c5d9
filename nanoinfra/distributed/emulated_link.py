"""An emulated network link: makes communication time visible, and predictable, on a laptop.

A collective on n ranks holds the link for T = steps * latency + ring bytes / bandwidth
(formulas/collectives.py), from the moment when the last rank entered it and the link was free. Entry times
travel beside the data, so every rank computes the same timeline; a rank that waits sleeps until the transfer
ends, so overlap and exposed communication are real. One host only: the ranks must share `time.monotonic`.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class EmulatedLink:
    """A link with a latency in s a message and a bandwidth in bytes/s, one way."""
    latency: float
    bandwidth: float
    free_at: float = 0.0                     # `time.monotonic` seconds when the last transfer ends

    def __post_init__(self):
        self._queued_transfers = []          # collectives entered, not yet placed on the timeline, in order

    def transfer_seconds(self, op: str, payload_bytes: int, num_ranks: int) -> float:
        """How long `op` holds the link."""
        # imported here, so that distributed/ can be lifted without formulas/
        from nanoinfra.formulas.collectives import ring_collective_seconds

        return ring_collective_seconds(op, payload_bytes, num_ranks, self.latency, self.bandwidth)

    def start_transfer(self, op: str, payload_bytes: int, num_ranks: int,
                       start_max: Callable[[torch.Tensor], object]) -> "_Transfer":
        """Queue a collective. `start_max(t)` starts an all-reduce of entry times `t` (1,) to the latest."""
        entry_time = torch.tensor([time.monotonic()], dtype=torch.float64)
        seconds = self.transfer_seconds(op, payload_bytes, num_ranks)
        self._queued_transfers.append(_Transfer(entry_time, start_max(entry_time), seconds))
        return self._queued_transfers[-1]

    def sleep_until_done(self, transfer: "_Transfer") -> None:
        """Place all transfers up to this one on the timeline, in their order, and sleep until it ends."""
        while transfer.end is None:
            first = self._queued_transfers.pop(0)
            first.work.wait()
            self.free_at = first.end = max(first.entry_time.item(), self.free_at) + first.seconds
        sleep_until(transfer.end)

    def schedule_message_arrival(self, payload_bytes: int) -> torch.Tensor:
        """Put a message on the timeline now; returns when it arrives, (1,) float64 `time.monotonic` seconds.

        The receiver sleeps until then.
        """
        self.free_at = max(time.monotonic(), self.free_at) + self.transfer_seconds("send", payload_bytes, 2)
        return torch.tensor([self.free_at], dtype=torch.float64)


@dataclass(eq=False)
class _Transfer:
    """One collective on the link's timeline."""
    entry_time: torch.Tensor                 # (1,) of the last rank, once `work` is done
    work: object                             # the all-reduce that finds it
    seconds: float
    end: float | None = None


def sleep_until(monotonic_time: float) -> None:
    """Sleep until `time.monotonic()` says so; the last millisecond is spun, because sleep overshoots."""
    while (left := monotonic_time - time.monotonic()) > 0:
        time.sleep(max(0.0, left - 1e-3))
