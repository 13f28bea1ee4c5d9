"""Lesson 02, the ring from send and receive: sums, bits, messages, bytes, nothing but `exchange`."""
import torch

from nanoinfra.dist.mesh import Mesh, world_size
from nanoinfra.formulas.wire import ring_bytes, ring_steps
from nanoinfra.lab.check import Check, Wrong, ranks
from nanoinfra.lab.same import same

PREDICTIONS = ("L02.bytes", "L02.seconds")
WORLDS = (1, 2, 3, 4)
CHUNK = 5                                    # numbers in a chunk: odd, so that halves would show
OWN_ORDER = "each rank adds up in its own order; let one rank sum a chunk and send that?"

ring_reduce_scatter = Check("ring_reduce_scatter")
ring_all_reduce = Check("ring_all_reduce")
CHECKS = (ring_reduce_scatter, ring_all_reduce)


@ring_reduce_scatter.criterion("rank r has the sum of row r", "property")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n, rows=True)
        want = sum(run["before"] for run in runs)                                      # (N, CHUNK)
        for r, run in enumerate(runs):
            same("the row", run["after"], want[r], r, n, causes=_slips(runs, want, r) if n > 1 else None)


@ring_reduce_scatter.criterion("only exchange", "resource")
def _(subject):
    _only_exchange(_runs(subject, 4, rows=True))


@ring_reduce_scatter.criterion("sends (N-1)/N of the bytes", "resource")
def _(subject):
    for n in WORLDS:
        _sends(_runs(subject, n, rows=True), "reduce_scatter")


@ring_all_reduce.criterion("every rank has the sum", "property")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n)
        want = sum(run["before"] for run in runs)                                      # (N * CHUNK,)
        for r, run in enumerate(runs):
            same("x", run["after"], want, r, n, causes={"nothing was added to it?": run["before"]})


@ring_all_reduce.criterion("the same bits on every rank", "parity")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n, fractions=True)
        want = sum(run["before"] for run in runs)
        for r, run in enumerate(runs):
            same("x", run["after"], want, r, n, rtol=1e-14)
            same("x, against rank 0", run["after"], runs[0]["after"], r, n, causes={OWN_ORDER: run["after"]})


@ring_all_reduce.criterion("only exchange", "resource")
def _(subject):
    _only_exchange(_runs(subject, 4))


@ring_all_reduce.criterion("sends 2(N-1)/N of the bytes", "resource")
def _(subject):
    for n in WORLDS:
        _sends(_runs(subject, n), "all_reduce")


def _slips(runs, want, r):
    """What rank r would hold after the usual mistakes."""
    right = (r + 1) % len(runs)
    return {"the right neighbour's row?": want[right],
            "one hop short?": want[right] - runs[right]["before"][right],
            "nothing was added to it?": runs[r]["before"][r],
            "passed on without adding?": runs[right]["before"][r],
            "your own row of another chunk added?": runs[right]["before"][r] + runs[r]["before"][r - 1]}


def _runs(subject, n, rows=False, fractions=False):
    """What `subject` did on each of n ranks. One rank is this process; two are a row of a 2 x 2 mesh."""
    if n == 1:
        return [_one(subject, 1, rows, fractions)]
    return ranks(4 if n == 2 else n).run(_one, subject, n, rows, fractions)[:n]


def _one(subject, n, rows, fractions):
    mesh = Mesh(dp=n, pp=world_size() // n)
    draw = torch.Generator().manual_seed(17 + mesh.dp.rank)
    shape = (n, CHUNK) if rows else (n * CHUNK,)
    x = torch.randint(-99, 99, shape, generator=draw).double()
    x = x + torch.rand(shape, generator=draw, dtype=torch.float64) if fractions else x
    before = x.clone()
    after = subject(x, mesh.dp)
    return {"before": before, "after": after, "ledger": [(row.op, row.payload) for row in mesh.ledger.take()]}


def _only_exchange(runs):
    for rank, run in enumerate(runs):
        others = sorted({op for op, _ in run["ledger"]} - {"exchange"})
        if others:
            raise Wrong(f"rank {rank} calls comm.{', comm.'.join(others)}; build it from comm.exchange alone")


def _sends(runs, op):
    n, full = len(runs), runs[0]["before"].numel() * 8                                 # float64
    want = ring_steps(op, n), round(ring_bytes(op, full, n))
    for rank, run in enumerate(runs):
        got = len(run["ledger"]), sum(size for _, size in run["ledger"])
        if got != want:
            raise Wrong(f"rank {rank} of {n} sends {got[1]} bytes in {got[0]} exchanges, want {want[1]} in "
                        f"{want[0]} (a chunk is {full // n} bytes): {_cause(got, want, full)}")


def _cause(got, want, full):
    if got[0] and got[1] == got[0] * full:
        return "the whole tensor instead of a chunk?"
    if got[1] == want[1]:
        return "each chunk in several messages? Each of them pays the latency"
    return "a step too many or too few?" if got[0] != want[0] else "chunks of another size?"
