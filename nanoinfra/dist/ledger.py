"""What communication cost, and where each rank stands.

The ledger keeps one row per collective: payload bytes (counted), bytes on the wire (modelled by the ring formulas),
sequence number on its axis, and the time its caller stood waiting (timed). A board is one small file that every
rank of a run writes its position into, so that whoever outlives a hang can say who waits for whom, even if a rank
was stopped or killed.
"""
import json
import mmap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SLOT = 2048                                  # bytes a rank has on the board


@dataclass
class Row:
    """One collective as this rank saw it. Times are `time.monotonic` seconds, the same clock on all of a host's ranks."""
    op: str
    axis: str
    tag: str
    n: int                                   # ranks on the axis
    payload: int                             # bytes, counted
    seq: int                                 # from 1, per axis
    begin: float                             # entered
    end: float = 0.0                         # result in hand; 0 while it runs
    wait_s: float = 0.0                      # of that, the time the caller stood still

    @property
    def wire_bytes(self) -> float:
        """Bytes this rank sends if the collective is a ring (modelled)."""
        from nanoinfra.formulas.wire import ring_bytes  # here, so that dist/ can be lifted without formulas/
        return ring_bytes(self.op, self.payload, self.n)


class Ledger:
    """The rows of one mesh on one rank, oldest first. `take()` hands them over and starts a new page."""

    def __init__(self):
        self.rows: list[Row] = []
        self.entered = Counter()             # axis -> how many collectives this rank has entered

    def enter(self, op: str, axis, tag: str, payload: int) -> Row:
        """Open a row; `axis` is the mesh's Axis."""
        self.entered[axis.name] += 1
        row = Row(op, axis.name, tag, axis.size, payload, self.entered[axis.name], time.monotonic())
        self.rows.append(row)
        self._tell(row, axis.ranks, "waits")
        return row

    def leave(self, row: Row, wait_s: float) -> None:
        """Close `row`, whose caller stood still for `wait_s` seconds."""
        row.end, row.wait_s = time.monotonic(), wait_s
        self._tell(row, (), "left")

    def take(self) -> list[Row]:
        """All rows since the last call."""
        rows, self.rows = self.rows, []
        return rows

    def _tell(self, row, ranks, state):
        if _board:
            _board[0].write({"state": state, "op": row.op, "axis": row.axis, "tag": row.tag, "seq": row.seq,
                             "ranks": list(ranks), "entered": dict(self.entered), "since": time.monotonic()})


class Board:
    """One slot a rank in a shared file. The same path on every rank; `rank` None only reads."""

    def __init__(self, path: Path | str, world: int, rank: int | None = None):
        self.path, self.world, self.rank = Path(path), world, rank
        with open(self.path, "ab") as f:
            f.truncate(world * SLOT)
        with open(self.path, "r+b") as f:
            self.map = mmap.mmap(f.fileno(), world * SLOT)

    def write(self, position: dict) -> None:
        """Say where this rank stands."""
        text = json.dumps(position).encode()[:SLOT - 1] + b"\n"
        start = self.rank * SLOT
        self.map[start:start + len(text)] = text

    def positions(self) -> list[dict]:
        """What each rank last said; {} for one that has said nothing yet."""
        slots = [self.map[r * SLOT:(r + 1) * SLOT].split(b"\n")[0] for r in range(self.world)]
        return [json.loads(s) if s[:1] == b"{" else {} for s in slots]


_board: list[Board] = []                     # where this process reports, as with logging's root handler


def report_to(board: Board | None) -> None:
    """From now on the ledgers of this process also write to `board`."""
    _board[:] = [board] if board else []


def reporting() -> bool:
    """Does this process report to a board already?"""
    return bool(_board)


def hang_report(positions: list[dict], alive: Callable[[int], bool] = lambda rank: True) -> str:
    """A line a rank, in words: who waits in what, and who never came. `alive(rank)` says whether it still runs."""
    return "\n".join(_stand(rank, at, positions, alive(rank)) for rank, at in enumerate(positions))


def _stand(rank, at, positions, alive):
    gone = "" if alive else " (its process has ended)"
    if not at:
        return f"rank {rank} has entered no collective yet{gone}"
    name = f"{at['op']} #{at['seq']} ({at['axis']}{', ' + at['tag'] if at['tag'] else ''})"
    if at["state"] != "waits":
        return f"rank {rank} last left {name}{gone}"
    missing = [r for r in at["ranks"] if positions[r].get("entered", {}).get(at["axis"], 0) < at["seq"]]
    if not missing:
        return f"rank {rank} is in {name} with all its ranks{gone}"
    who = "rank " + str(missing[0]) if len(missing) == 1 else "ranks " + ", ".join(map(str, missing))
    return f"rank {rank} waits in {name} that {who} never entered{gone}"
