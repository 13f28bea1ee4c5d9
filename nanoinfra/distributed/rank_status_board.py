"""Where each rank stands, in one small shared file, and a report that says which ranks a hang waits for.

Every rank of a run writes its status (the collective that it is in) into a slot of the file. A process that
outlives a hang reads all slots, even if a rank was stopped or killed, and says who waits for whom.
"""
import json
import mmap
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

_SLOT_BYTES = 8192                           # bytes a rank has in the file
_PEER_DID_NOT = {"send": "received", "recv": "sent"}     # what the other side of a message has not done yet


class StatusBoard:
    """One slot a rank in a shared file. The same path on every rank; `rank` None only reads."""

    def __init__(self, path: Path | str, world_size: int, rank: int | None = None):
        self.world_size, self.rank, self.entered_counts = world_size, rank, Counter()
        self.process_identity = {"pid": os.getpid(), "host": os.uname().nodename}
        with open(path, "ab") as f:
            f.truncate(world_size * _SLOT_BYTES)
        with open(path, "r+b") as f:
            self._map = mmap.mmap(f.fileno(), world_size * _SLOT_BYTES)

    def write_status(self, status: dict) -> None:
        """Write this rank's status, with its process id and host."""
        text = json.dumps(status | self.process_identity).encode() + b"\n"
        start = self.rank * _SLOT_BYTES
        self._map[start:start + 1] = b" "    # a half-written slot reads as empty
        self._map[start + 1:start + len(text)] = text[1:]
        self._map[start:start + 1] = text[:1]

    def read_statuses(self) -> list[dict]:
        """The last status of each rank, with its "pid" and "host"; {} for a rank that has written none."""
        slots = [self._read_slot(rank).split(b"\n")[0] for rank in range(self.world_size)]
        return [json.loads(s) if s[:1] == b"{" else {} for s in slots]

    def clear_statuses(self) -> None:
        """Remove every rank's status."""
        for rank in range(self.world_size):
            self._map[rank * _SLOT_BYTES:rank * _SLOT_BYTES + 1] = b" "

    def _read_slot(self, rank):
        now = None
        while now != (now := self._map[rank * _SLOT_BYTES:(rank + 1) * _SLOT_BYTES]):
            pass                             # two equal reads: not in the middle of a write
        return now


_current_board: list[StatusBoard] = []       # at most one for the process, as a root logger


def report_status_to(board: StatusBoard | None) -> None:
    """From now on every CommLog of this process also writes its status to `board`; None ends that."""
    _current_board[:] = [board] if board else []


def current_status_board() -> StatusBoard | None:
    """The board that this process writes its status to, if any."""
    return _current_board[0] if _current_board else None


def hang_report(statuses: list[dict], rank_fate: Callable[[int], str] = lambda rank: "") -> str:
    """A line for each rank: the collective it waits in, and the ranks that have not entered that.

    `rank_fate(rank)` adds what became of the process, as "is stopped".
    """
    lines = [_describe(rank, status, statuses) for rank, status in enumerate(statuses)]
    return "\n".join(f"{line}; it {rank_fate(rank)}" if rank_fate(rank) else line
                     for rank, line in enumerate(lines))


def missing_ranks(waiting_rank: int, statuses: list[dict]) -> list[int]:
    """The ranks that have not entered the collective that `waiting_rank` waits in; [] if it does not wait."""
    status = statuses[waiting_rank]
    if status.get("state") != "waits":
        return []
    return [rank for rank in status["ranks"]
            if statuses[rank].get("entered", {}).get(status["line"], 0) < status["count"]]


def _describe(rank, status, statuses):
    if "op" not in status:
        return f"rank {rank} has entered no collective"
    tag = f", {status['tag']}" if status["tag"] else ""
    name = f"{status['op']} #{status['seq']} ({status['axis']}{tag})"
    if status["state"] == "left":
        return f"rank {rank} last left {name}"
    if status["state"] == "started":
        return f"rank {rank} started {name} and went on"
    missing = missing_ranks(rank, statuses)
    if not missing:
        return f"rank {rank} is in {name} with all its ranks"
    who = "rank " + str(missing[0]) if len(missing) == 1 else "ranks " + ", ".join(map(str, missing))
    return f"rank {rank} waits in {name} that {who} never {_PEER_DID_NOT.get(status['op'], 'entered')}"
