import time

import pytest
import torch

from nanoinfra.distributed import comm
from nanoinfra.distributed.comm_log import CommLog, CommRecord
from nanoinfra.distributed.mesh import Mesh, MeshAxis, world_size
from nanoinfra.distributed.rank_status_board import (
    StatusBoard,
    current_status_board,
    hang_report,
    report_status_to,
)

OPS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "ring_shift"]


def call_each():
    mesh = Mesh(dp=2, tp=2)
    x = torch.ones(4, 3)
    for op in OPS:
        getattr(comm, op)(x[:2], mesh.dp, f"tag {op}")
        getattr(comm, op)(x[:2].bfloat16(), mesh.tp, async_op=True).wait()
    comm.barrier(mesh.tp)
    rows = mesh.comm_log.take_records()
    assert mesh.comm_log.records == []
    return rows


def test_rows(ranks):
    for rows in ranks(4).run(call_each):
        dp, tp = ([row for row in rows if row.axis_name == name] for name in ("dp", "tp"))
        assert [(r.op, r.tag) for r in dp] == [(op, f"tag {op}") for op in OPS]
        assert [r.payload_bytes for r in dp] == [24, 48, 24, 24, 24, 24]                     # (2, 3) float32
        assert [r.payload_bytes for r in tp] == [12, 24, 12, 12, 12, 12, 0]     # (2, 3) bfloat16; barrier
        assert [r.sequence_number for r in dp] == [1, 2, 3, 4, 5, 6]
        assert [r.sequence_number for r in tp] == [1, 2, 3, 4, 5, 6, 7]
        assert [r.modelled_ring_bytes for r in dp] == [24, 24, 12, 12, 24, 24]
        assert all(r.axis_size == 2 and 0 < r.start_time <= r.end_time
                   and 0 <= r.wait_seconds <= r.end_time - r.start_time for r in rows)


def call_on_axes_of_one():
    mesh = Mesh(tp=world_size())
    x = torch.ones(1, 3)
    for op in OPS:
        for axis in (mesh.dp, mesh.pp, mesh.cp, mesh.data):
            getattr(comm, op)(x, axis)
    groups = [axis.group for axis in (mesh.dp, mesh.pp, mesh.cp, mesh.data)]
    return mesh.comm_log.records, dict(mesh.comm_log.entered_counts), groups


def test_an_axis_of_one_has_no_rows_and_no_group(ranks):
    assert ranks(2).run(call_on_axes_of_one) == [([], {}, [None] * 4)] * 2


def wait_late(pause):
    axis = Mesh(dp=2).dp
    comm.barrier(axis)
    time.sleep(pause if axis.rank else 0)
    comm.all_reduce(torch.ones(2), axis)
    return axis.comm_log.records[-1].wait_seconds


@pytest.mark.timed
def test_waiting_is_the_callers_standstill(ranks):
    early, late = ranks(2).run(wait_late, 0.3)
    assert early >= 0.25
    assert late <= 0.15


# -- the board and the report: no processes needed

def line(rank, world, name="tp"):
    return MeshAxis(name, rank, tuple(range(world)), None, CommLog())


@pytest.fixture
def board(tmp_path):
    """stand(rank, *steps) plays what a rank did; each in its own count, as in its own process."""
    path, reader = tmp_path / "board", StatusBoard(tmp_path / "board", 3)

    def stand(rank, play):
        report_status_to(StatusBoard(path, 3, rank))
        play(line(rank, 3))
        report_status_to(None)
    yield stand, reader
    assert current_status_board() is None


def enter(axis, times=1, op="all_reduce", tag="", ranks=None, leave=True):
    for _ in range(times):
        row = axis.comm_log.start_record(op, axis, tag, 8, ranks)
        axis.comm_log.mark_waiting(row)
        if leave:
            axis.comm_log.finish_record(row, 0.0)


def test_report_names_who_never_came(board):
    stand, reader = board
    stand(0, lambda axis: enter(axis, 16))
    stand(2, lambda axis: (enter(axis, 16), enter(axis, tag="grads", leave=False)))
    assert hang_report(reader.read_statuses()).split("\n") == [
        "rank 0 last left all_reduce #16 (tp)",
        "rank 1 has entered no collective",
        "rank 2 waits in all_reduce #17 (tp, grads) that ranks 0, 1 never entered"]


def test_report_when_all_have_come(board):
    stand, reader = board
    for rank in range(3):
        stand(rank, lambda axis: enter(axis, leave=False))
    got = hang_report(reader.read_statuses(), lambda rank: "is stopped" if rank == 1 else "")
    assert got.split("\n") == ["rank 0 is in all_reduce #1 (tp) with all its ranks",
                               "rank 1 is in all_reduce #1 (tp) with all its ranks; it is stopped",
                               "rank 2 is in all_reduce #1 (tp) with all its ranks"]


def test_report_of_messages_counts_by_sender_and_receiver(board):
    stand, reader = board
    stand(0, lambda axis: enter(axis, 3, "send", ranks=(0, 1)))
    stand(1, lambda axis: (enter(axis, 3, "recv", ranks=(0, 1)), enter(axis, 5, "send", ranks=(1, 2)),
                           enter(axis, op="recv", ranks=(0, 1), leave=False)))
    stand(2, lambda axis: (enter(axis, 5, "recv", ranks=(1, 2)), enter(axis, leave=False)))
    assert hang_report(reader.read_statuses()).split("\n") == [
        "rank 0 last left send #3 (tp)",
        "rank 1 waits in recv #4 (tp) that rank 0 never sent",
        "rank 2 waits in all_reduce #1 (tp) that ranks 0, 1 never entered"]


def test_report_of_collectives_under_way(board):
    """A wait for the first of two is not a wait for the second, and one that nobody waits for is none."""
    stand, reader = board

    def overlap(axis):
        first, second = (axis.comm_log.start_record("all_reduce", axis, "", 8) for _ in range(2))
        axis.comm_log.finish_record(first, 0.0)
        axis.comm_log.mark_waiting(second)
    stand(0, overlap)
    stand(1, lambda axis: axis.comm_log.start_record("all_reduce", axis, "", 8))
    assert hang_report(reader.read_statuses()).split("\n")[:2] == [
        "rank 0 waits in all_reduce #2 (tp) that ranks 1, 2 never entered",
        "rank 1 started all_reduce #1 (tp) and went on"]


def test_report_counts_across_meshes(board):
    """A second mesh starts its seq at 1; a rank that stayed in the first mesh is still behind."""
    stand, reader = board
    stand(0, lambda axis: enter(axis, 5))
    stand(1, lambda axis: (enter(axis, 5), enter(line(1, 3), leave=False)))
    assert hang_report(reader.read_statuses()).split("\n")[1] == \
        "rank 1 waits in all_reduce #1 (tp) that ranks 0, 2 never entered"


def test_a_half_written_position_says_nothing(tmp_path):
    board = StatusBoard(tmp_path / "board", 2, rank=1)
    board.write_status({"state": "left", "note": "x" * 3000})
    assert board.read_statuses() == [{}, {"state": "left", "note": "x" * 3000, **board.process_identity}]
    StatusBoard(tmp_path / "board", 2)._map[8192:8193] = b" "
    assert board.read_statuses() == [{}, {}]
    board.write_status({"state": "left"})
    assert board.read_statuses()[1] == {"state": "left", **board.process_identity}
    board.clear_statuses()
    assert board.read_statuses() == [{}, {}]


def test_wire_bytes_are_the_ring_formulas():
    assert CommRecord("all_reduce", "dp", "", 4, 1000, 1, 0.0).modelled_ring_bytes == 1500
