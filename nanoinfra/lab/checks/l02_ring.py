"""Lesson 02: the ring from send and receive. Sums, bits, bytes, messages, and nothing but `exchange` on the wire."""
import torch

from nanoinfra.dist.mesh import Mesh
from nanoinfra.formulas.wire import ring_bytes, ring_steps
from nanoinfra.lab.check import Check, Wrong, ranks
from nanoinfra.lab.same import same

PREDICTIONS = ("L02.bytes", "L02.seconds")
WORLDS = (1, 2, 3, 4)
CHUNK = 5                                    # numbers in a chunk: odd, so that halves would show

ring_reduce_scatter = Check("ring_reduce_scatter")
ring_all_reduce = Check("ring_all_reduce")
CHECKS = (ring_reduce_scatter, ring_all_reduce)


@ring_reduce_scatter.criterion("rank r ends with the sum of chunk r+1", "property")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n, parts=True)
        want = sum(x for x, _, _ in runs)                                              # (N, CHUNK)
        for r, (before, after, _) in enumerate(runs):
            c = (r + 1) % n
            name = f"parts[{c}]"
            same(name, after[c], want[c], r, n, causes={"nothing was added to it?": before[c],
                                                        "overwritten instead of added?": runs[r - 1][0][c]})


@ring_reduce_scatter.criterion("sends N-1 chunks, by exchange alone", "resource")
def _(subject):
    for n in WORLDS:
        _counts(_runs(subject, n, parts=True), "reduce_scatter", n)


@ring_all_reduce.criterion("every rank has the sum", "property")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n)
        want = sum(x for x, _, _ in runs)                                              # (N * CHUNK,)
        for r, (before, after, _) in enumerate(runs):
            same("x", after, want, r, n, causes={"nothing was added to it?": before})


@ring_all_reduce.criterion("float64 to 1e-14, the same bits on every rank", "parity")
def _(subject):
    for n in WORLDS:
        runs = _runs(subject, n, fractions=True)
        want = sum(x for x, _, _ in runs)
        for r, (_, after, _) in enumerate(runs):
            same("x", after, want, r, n, rtol=1e-14)
            same("x, against rank 0's", after, runs[0][1], r, n,
                 causes={"each rank adds up in its own order; let one rank sum a chunk, and send that": after})


@ring_all_reduce.criterion("sends 2(N-1)/N of the bytes, by exchange alone", "resource")
def _(subject):
    for n in WORLDS:
        _counts(_runs(subject, n), "all_reduce", n)


def _runs(subject, n, parts=False, fractions=False):
    """(before, after, [(op, bytes)]) of each rank."""
    pool = [_one_run(subject, 1, parts, fractions)] if n == 1 else None
    return pool or ranks(n).run(_one_run, subject, n, parts, fractions)


def _one_run(subject, n, parts, fractions):
    mesh = Mesh(dp=n)
    draw = torch.Generator().manual_seed(17 + mesh.dp.rank)
    shape = (n, CHUNK) if parts else (n * CHUNK,)
    x = torch.randint(-99, 99, shape, generator=draw).double()
    x = x + torch.rand(shape, generator=draw, dtype=torch.float64) if fractions else x
    before = x.clone()
    mesh.ledger.take()
    got = subject(x, mesh.dp)
    return before, x if parts else got, [(row.op, row.payload) for row in mesh.ledger.take()]


def _counts(runs, op, n):
    payload = runs[0][0].numel() * runs[0][0].element_size()
    want = round(ring_bytes(op, payload, n)), ring_steps(op, n)
    for rank, (_, _, rows) in enumerate(runs):
        others = sorted({name for name, _ in rows} - {"exchange"})
        if others:
            raise Wrong(f"rank {rank} of {n}: calls {', '.join(others)}; this exercise is made of comm.exchange alone")
        got = sum(size for _, size in rows), len(rows)
        if got != want:
            raise Wrong(f"rank {rank} of {n}: sends {got[0]} bytes in {got[1]} messages, want {want[0]} in {want[1]} "
                        f"({payload} bytes in all, {payload // n} a chunk): {_cause(got, want, payload)}")


def _cause(got, want, payload):
    if got[1] and got[0] == got[1] * payload:
        return "the whole tensor instead of a chunk?"
    return "one step too many or too few?" if got[1] != want[1] else "a chunk of another size?"
