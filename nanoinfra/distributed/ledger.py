"""What communication cost, and where each rank stands.

The ledger keeps one row per collective: payload bytes (counted), bytes on the wire (modelled by the ring
formulas), sequence number on its axis, and the time its caller stood waiting (timed). A board is one small
file that every rank of a run writes its position into, so that whoever outlives a hang can say who waits for
whom, even if a rank was stopped or killed.
"""
import json
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SLOT = 8192                                  # bytes a rank has on the board
_PEER = {"send": "received", "recv": "sent"}  # what the other side of a message has not done yet


@dataclass
class Row:
    """One collective as this rank saw it. Times are `time.monotonic` seconds, one clock on a host."""
    op: str
    axis: str
    tag: str
    n: int                                   # ranks on the axis
    payload: int                             # bytes, counted
    seq: int                                 # from 1, per axis; messages count per sender and receiver
    begin: float                             # entered
    end: float = 0.0                         # result in hand; 0 while it runs
    wait_s: float = 0.0                      # of that, the time the caller stood still
    ranks: tuple[int, ...] = ()              # global ranks that take part; of a message, sender and receiver

    @property
    def line(self) -> str:
        """What `seq` counts along: all ranks of a line agree on the order of its rows."""
        return f"{self.axis} {self.ranks[0]}>{self.ranks[1]}" if self.op in _PEER else self.axis

    @property
    def wire_bytes(self) -> float:
        """Bytes this rank sends if the collective is a ring (modelled)."""
        from nanoinfra.formulas.collectives import (
            ring_bytes,  # here, so that dist/ can be lifted without formulas/
        )

        return ring_bytes(self.op, self.payload, self.n)


class Ledger:
    """The rows of one mesh on one rank, oldest first. `take()` hands them over and starts a new page."""

    def __init__(self):
        self.rows: list[Row] = []
        self.entered = Counter()             # line -> how many rows this rank has entered on it

    def enter(self, op: str, axis, tag: str, payload: int, ranks: tuple[int, ...] | None = None) -> Row:
        """Open a row; `axis` is the mesh's Axis, `ranks` the sender and receiver of a message."""
        row = Row(op, axis.name, tag, axis.size, payload, 0, time.monotonic(), ranks=ranks or axis.ranks)
        self.entered[row.line] += 1
        row.seq = self.entered[row.line]
        self.rows.append(row)
        if _board:
            _board[0].entered[row.line] += 1
        self._tell(row, "started")
        return row

    def wait(self, row: Row) -> None:
        """The caller stands still for `row` from now on."""
        self._tell(row, "waits")

    def leave(self, row: Row, wait_s: float) -> None:
        """Close `row`, whose caller stood still for `wait_s` seconds."""
        row.end, row.wait_s = time.monotonic(), wait_s
        self._tell(row, "left")

    def take(self) -> list[Row]:
        """All rows since the last call."""
        rows, self.rows = self.rows, []
        return rows

    def _tell(self, row, state):
        if _board:
            entered = _board[0].entered      # of all meshes of this process, in one count
            count = entered[row.line] - (self.entered[row.line] - row.seq)
            _board[0].write({"state": state, "op": row.op, "axis": row.axis, "tag": row.tag, "seq": row.seq,
                             "line": row.line, "count": count, "ranks": row.ranks, "entered": entered})


class Board:
    """One slot a rank in a shared file. The same path on every rank; `rank` None only reads."""

    def __init__(self, path: Path | str, world: int, rank: int | None = None):
        self.world, self.rank, self.entered = world, rank, Counter()
        self.me = {"pid": os.getpid(), "host": os.uname().nodename}
        with open(path, "ab") as f:
            f.truncate(world * SLOT)
        with open(path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), world * SLOT)

    def write(self, position: dict) -> None:
        """Say where this rank stands."""
        text = json.dumps(position | self.me).encode() + b"\n"
        start = self.rank * SLOT
        self.map[start:start + 1] = b" "     # says nothing while half written, should this rank die just here
        self.map[start + 1:start + len(text)] = text[1:]
        self.map[start:start + 1] = text[:1]

    def positions(self) -> list[dict]:
        """What each rank last said, with its "pid" and "host"; {} for one that has said nothing yet."""
        slots = [self._slot(rank).split(b"\n")[0] for rank in range(self.world)]
        return [json.loads(s) if s[:1] == b"{" else {} for s in slots]

    def clear(self) -> None:
        """Forget what every rank said."""
        for rank in range(self.world):
            self.map[rank * SLOT:rank * SLOT + 1] = b" "

    def _slot(self, rank):
        now = None
        while now != (now := self.map[rank * SLOT:(rank + 1) * SLOT]):
            pass                             # read twice the same: not caught in the middle of a write
        return now


_board: list[Board] = []                     # where this process reports, as with logging's root handler


def report_to(board: Board | None) -> None:
    """From now on the ledgers of this process also write to `board`."""
    _board[:] = [board] if board else []


def reporting() -> bool:
    """Does this process report to a board already?"""
    return bool(_board)


def hang_report(positions: list[dict], fate: Callable[[int], str] = lambda rank: "") -> str:
    """A line a rank, in words: who waits in what, and who never came. `fate(rank)` adds what became of it."""
    lines = [_stand(rank, at, positions) for rank, at in enumerate(positions)]
    return "\n".join(f"{line}; it {fate(rank)}" if fate(rank) else line for rank, line in enumerate(lines))


def absent(rank: int, positions: list[dict]) -> list[int]:
    """The ranks that `rank` waits for and that have not come; none where it does not wait."""
    at = positions[rank]
    if at.get("state") != "waits":
        return []
    return [r for r in at["ranks"] if positions[r].get("entered", {}).get(at["line"], 0) < at["count"]]


def _stand(rank, at, positions):
    if "op" not in at:
        return f"rank {rank} has entered no collective"
    name = f"{at['op']} #{at['seq']} ({at['axis']}{', ' + at['tag'] if at['tag'] else ''})"
    if at["state"] == "left":
        return f"rank {rank} last left {name}"
    if at["state"] == "started":
        return f"rank {rank} started {name} and went on"
    missing = absent(rank, positions)
    if not missing:
        return f"rank {rank} is in {name} with all its ranks"
    who = "rank " + str(missing[0]) if len(missing) == 1 else "ranks " + ", ".join(map(str, missing))
    return f"rank {rank} waits in {name} that {who} never {_PEER.get(at['op'], 'entered')}"
