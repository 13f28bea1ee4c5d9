"""What communication cost: one record for each collective of one mesh on one rank (torch: flight recorder).

A record holds the payload bytes (counted), the bytes that a ring would send (modelled), the sequence number
on its axis, and the time for which its caller waited (timed). Where the process has a StatusBoard, the rank's
status is written there too, for a report on hangs.
"""
import time
from collections import Counter
from dataclasses import dataclass

from nanoinfra.distributed.rank_status_board import current_status_board


@dataclass
class CommRecord:
    """One collective as this rank saw it. Times are `time.monotonic` seconds, one clock on a host."""
    op: str
    axis_name: str
    tag: str
    axis_size: int
    payload_bytes: int                       # counted
    sequence_number: int                     # from 1, per axis; messages count per sender and receiver
    start_time: float                        # entered
    end_time: float = 0.0                    # result in hand; 0 while it runs
    wait_seconds: float = 0.0                # of that, the time for which the caller was blocked
    global_ranks: tuple[int, ...] = ()       # that take part; of a message, sender and receiver

    @property
    def sequence_key(self) -> str:
        """What `sequence_number` counts along: all its ranks agree on the order of the records of a key."""
        if self.op not in ("send", "recv"):
            return self.axis_name
        return f"{self.axis_name} {self.global_ranks[0]}>{self.global_ranks[1]}"

    @property
    def modelled_ring_bytes(self) -> float:
        """Bytes that this rank sends if the collective is a ring (modelled)."""
        # imported here, so that distributed/ can be lifted without formulas/
        from nanoinfra.formulas.collectives import ring_bytes_per_rank

        return ring_bytes_per_rank(self.op, self.payload_bytes, self.axis_size)


class CommLog:
    """The records of one mesh on one rank, oldest first."""

    def __init__(self):
        self.records: list[CommRecord] = []
        self.entered_counts = Counter()      # sequence_key -> how many records this rank has started on it

    def start_record(self, op: str, axis, tag: str, payload_bytes: int,
                     global_ranks: tuple[int, ...] | None = None) -> CommRecord:
        """Append a record; `axis` is a MeshAxis, `global_ranks` the sender and receiver of a message."""
        record = CommRecord(op, axis.name, tag, axis.size, payload_bytes, 0, time.monotonic(),
                            global_ranks=global_ranks or axis.global_ranks)
        self.entered_counts[record.sequence_key] += 1
        record.sequence_number = self.entered_counts[record.sequence_key]
        self.records.append(record)
        if board := current_status_board():
            board.entered_counts[record.sequence_key] += 1
        self._report(record, "started")
        return record

    def mark_waiting(self, record: CommRecord) -> None:
        """Report that the caller is blocked in `record` from now on."""
        self._report(record, "waits")

    def finish_record(self, record: CommRecord, wait_seconds: float) -> None:
        """Close `record`, whose caller was blocked for `wait_seconds`."""
        record.end_time, record.wait_seconds = time.monotonic(), wait_seconds
        self._report(record, "left")

    def take_records(self) -> list[CommRecord]:
        """All records since the last call; the log is empty afterwards."""
        records, self.records = self.records, []
        return records

    def _report(self, record, state):
        if board := current_status_board():
            entered = board.entered_counts   # of all meshes of this process, in one count
            key = record.sequence_key
            count = entered[key] - (self.entered_counts[key] - record.sequence_number)
            board.write_status({"state": state, "op": record.op, "axis": record.axis_name, "tag": record.tag,
                                "seq": record.sequence_number, "line": key, "count": count,
                                "ranks": record.global_ranks, "entered": entered})
