"""A stranger's visit to ranks at rest: which sockets he reaches, and what a pickle in their stores does."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.distributed.sockets import beyond_loopback, listening, open_to_others, plant

# What torch's rendezvous, its elastic agent and our ranks may look for in a store before it is there.
KNOWN = ("torch.rendezvous.none", "torch.rendezvous.nanoinfra", "MASTER_ADDR", "MASTER_PORT",
         "torchelastic/role_info/0", "torchelastic/assigned_ranks/0", "rank 0", "rank 1")


@dataclass
class Seen:
    """What came of it."""
    listens: list = field(default_factory=list)        # (address, port) of every socket
    beyond: list = field(default_factory=list)         # those of them that another host reaches
    open_to_others: list = field(default_factory=list)           # Unix sockets for every user
    planted: int = 0                                   # keys
    ran: bool = False                                  # the stranger's code
    ended_well: bool = False


def visit(ranks_at_rest: Callable, *without: str) -> Seen:
    """A stranger's visit to `launched`, `pooled` or `teamed`."""
    seen = Seen()
    with TemporaryDirectory() as folder:
        ran = Path(folder, "ran")

        def look(stores, pids):
            seen.listens = listening(pids)
            seen.beyond, seen.open_to_others = beyond_loopback(pids), open_to_others(pids)
            seen.planted = sum(len(plant(port, ran, KNOWN)) for port in stores)
        seen.ended_well = ranks_at_rest(look, *without)
        seen.ran = ran.exists()
    return seen
