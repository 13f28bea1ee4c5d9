"""Checks of lesson 02: reduce-scatter and all-reduce on a ring, their results, messages and bytes."""
import torch

from lessons.l02_ring_all_reduce.cases import chunk_label, count_labels, describe_labels
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.distributed.pool.rank_processes import RankFailedError
from nanoinfra.formulas.collectives import ring_bytes_per_rank, ring_steps
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor

PREDICTIONS = {"L02.bytes": "B", "L02.seconds": "s"}
WORLDS = (4, 3, 2, 1)                      # of the ring that the lesson draws first
CHUNK = 5                                    # numbers in a chunk: odd, so that halves would show
OWN_ORDER = "each rank adds up in its own order; let one rank sum a chunk and send that?"

ring_reduce_scatter = Check("ring_reduce_scatter")
ring_all_reduce = Check("ring_all_reduce")
CHECKS = (ring_reduce_scatter, ring_all_reduce)


@ring_reduce_scatter.criterion("rank r has the sum of row r", "property")
def _(subject):
    for n in WORLDS:
        _sums(subject, n, rows=True)


@ring_reduce_scatter.criterion("only ring_shift", "resource")
def _(subject):
    _only_ring_shift(_runs(subject, 4, rows=True))


@ring_reduce_scatter.criterion("sends (N-1)/N of the bytes", "resource")
def _(subject):
    for n in WORLDS:
        _sends(_runs(subject, n, rows=True), "reduce_scatter")


@ring_all_reduce.criterion("every rank has the sum", "property")
def _(subject):
    for n in WORLDS:
        _sums(subject, n)


@ring_all_reduce.criterion("`x` itself holds it: in place", "property")
def _(subject):
    for n in WORLDS:
        for r, run in enumerate(_runs(subject, n)):
            if not torch.equal(run["x"], run["after"]):
                left = "was not changed" if torch.equal(run["x"], run["before"]) else "holds other numbers"
                raise CriterionNotMet(f"ring of {n}, rank {r}: the returned tensor is right, but `x` {left}: "
                                      f"in place, please")


@ring_all_reduce.criterion("the same bits on every rank", "parity")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n, kind="fractions")
        want = sum(run["before"] for run in runs)
        for r, run in enumerate(runs):
            assert_same_tensor("x", run["after"], want, r, n, rtol=1e-14)
            assert_same_tensor("x, against rank 0", run["after"], runs[0]["after"], r, n,
                               likely_causes={OWN_ORDER: run["after"]})


@ring_all_reduce.criterion("only ring_shift", "resource")
def _(subject):
    _only_ring_shift(_runs(subject, 4))


@ring_all_reduce.criterion("sends 2(N-1)/N of the bytes", "resource")
def _(subject):
    for n in WORLDS:
        _sends(_runs(subject, n), "all_reduce")


def _sums(subject, n, rows=False):
    """Judged on random integers; what is wrong runs once more on numbers that say whose they are."""
    runs = _runs(subject, n, rows)
    want = sum(run["before"] for run in runs)                                  # (N, CHUNK) or (N * CHUNK,)
    for r, run in enumerate(runs):
        try:
            assert_same_tensor("the row" if rows else "x", run["after"], want[r] if rows else want, r, n)
        except CriterionNotMet as wrong:
            after = run["after"]
            comparable = isinstance(after, torch.Tensor) and after.dtype == want.dtype
            told = comparable and after.numel() == CHUNK * (1 if rows else n) and _whose(subject, n, rows, r)
            raise CriterionNotMet(told or f"ring of {n}, {wrong}") from None


def _whose(subject, n, rows, r):
    """The first wrong chunk of rank r in words, with the usual cause; empty where it cannot be told."""
    after = _runs(subject, n, rows, kind="labels")[r]["after"]
    for c, chunk in zip([r] if rows else range(n), after.reshape(-1, CHUNK)):
        found = count_labels(chunk, n)
        if found is None:
            return ""
        if found != {(rank, c): 1 for rank in range(n)}:
            hint = _hint(found, n, r, c, rows)
            return f"ring of {n}, rank {r}, chunk {c}: {describe_labels(found, c, n)}{hint and ': '}{hint}"
    return ""


def _hint(found, n, r, c, rows):
    """The usual mistake that leaves these parts in chunk c of rank r."""
    chunks, lacks = {part[1] for part in found}, {rank for rank in range(n) if (rank, c) not in found}
    times = found.values()
    if found == {(r, r - 1 if r else n - 1): 1} and rows:
        return "this is what `partial` was at the start. Is the sum kept in it?"
    if found == {(r, c): 1}:
        return "still your own numbers: was " + (
            "the finished chunk written into its row?" if c == r else "this chunk ever gathered?")
    if chunks and c not in chunks and len(chunks) == 1:
        whole = len(found) == n and set(times) == {1}
        where = "the wrong index?" if rows else "written into another row?"
        return f"this is chunk {min(chunks)}'s sum: {where}" if whole else "a hop too few or too many?"
    if len(chunks) > 1:
        return "parts of different chunks were added: the index?"
    if times and min(times) < 0:
        return "a - for a +?"
    if times and max(times) > 1:
        return "added where it should be written, or added twice?"
    return "what you return, or send on, lacks what you added?" if r in lacks else ""


def _runs(subject, n, rows=False, kind="whole"):
    """What `subject` did on each of n ranks. One rank is this process; two are a row of a 2 x 2 mesh."""
    if n == 1:
        return [_one(subject, 1, rows, kind)]
    try:
        return rank_pool_for_checks(4 if n == 2 else n).run(_one, subject, n, rows, kind)[:n]
    except RankFailedError as error:
        where = f"ring of {n}{' (two such, on 4 processes)' if n == 2 else ''}"
        raise RankFailedError(f"{where}: {error}") from None


def _one(subject, n, rows, kind):
    mesh = Mesh(dp=n, pp=world_size() // n)
    draw = torch.Generator().manual_seed(17 + mesh.dp.rank)
    x = torch.randint(-99, 99, (n, CHUNK), generator=draw).double()
    if kind == "fractions":
        x += torch.rand((n, CHUNK), generator=draw, dtype=torch.float64)
    if kind == "labels":
        x = torch.tensor([[chunk_label(mesh.dp.rank, c, n)] * CHUNK for c in range(n)], dtype=torch.float64)
    x = x if rows else x.view(-1)
    before = x.clone()
    after = subject(x, mesh.dp)
    rows_of_ledger = [(row.op, row.payload_bytes) for row in mesh.comm_log.take_records()]
    return {"before": before, "x": x, "after": after, "ledger": rows_of_ledger}


def _only_ring_shift(runs):
    for rank, run in enumerate(runs):
        others = sorted({op for op, _ in run["ledger"]} - {"ring_shift"})
        if others:
            raise CriterionNotMet(f"rank {rank} calls comm.{', comm.'.join(others)}; "
                                  "build it from "
                                  "comm.ring_shift alone")


def _sends(runs, op):
    n, full = len(runs), runs[0]["before"].numel() * 8                                 # float64
    want = ring_steps(op, n), round(ring_bytes_per_rank(op, full, n))
    for rank, run in enumerate(runs):
        got = len(run["ledger"]), sum(size for _, size in run["ledger"])
        if got != want:
            raise CriterionNotMet(f"rank {rank} of {n} sends {got[1]} bytes in {got[0]} exchanges, want "
                                  f"{want[1]} in {want[0]} (a chunk is {full // n} bytes): "
                                  f"{_cause(got, want, full)}")


def _cause(got, want, full):
    if got[0] and got[1] == got[0] * full:
        return "the whole tensor instead of a chunk?"
    if got[1] == want[1]:
        return "each chunk in several messages? Each of them pays the latency"
    return "a step too many or too few?" if got[0] != want[0] else "chunks of another size?"
