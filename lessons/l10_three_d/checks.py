"""Checks of lesson 10: coordinates on the mesh, sums over axes, and the global gradient norm."""
import functools
import math

import torch

from lessons.l10_three_d import cases
from lessons.l10_three_d.cases import MESHES, TIED
from nanoinfra.distributed.mesh import Mesh
from nanoinfra.distributed.pool.rank_pool import RankFailedError
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor

PREDICTIONS = {**{f"L10.{what}": "B" for what in ("tp_first", "tp_last", "pp", "dp_first", "dp_last", "tied",
                                                  "all")},
               **{f"L10.step_{axis}": "s" for axis in ("pp", "dp", "tp")}}
coordinates = Check("coordinates")
neighbours = Check("neighbours")
sum_gradients = Check("sum_gradients")
grad_norm = Check("grad_norm")
CHECKS = (coordinates, neighbours, sum_gradients, grad_norm)
ORDERS = ({"pp": 2, "dp": 2, "tp": 2}, {"pp": 2, "dp": 3, "tp": 4}, {"tp": 3, "pp": 4, "dp": 2}, {"dp": 5})
ENDED = {                                    # what is in a RankFailedError: the usual cause
    "gave no answer": "a rank waits in a sum that another does not come to: on an axis all make the same "
                      "calls; stages between the ends have no tied weight, and `ends` is None there",
    "SIGABRT": "did ranks send different sizes? On an axis all must have the same parameter's gradient"}


@coordinates.criterion("a place on each axis, no two ranks the same", "property")
def _(subject):
    for sizes in ORDERS:
        seen = {}
        for rank in range(math.prod(sizes.values())):
            got = _places(subject, rank, sizes)
            if got in seen:
                raise CriterionNotMet(f"ranks {seen[got]} and {rank} of {sizes} both stand at "
                                      f"{dict(zip(sizes, got))}")
            seen[got] = rank


@coordinates.criterion("the last axis is the fastest", "parity")
def _(subject):
    for sizes in ORDERS:
        for rank in range(math.prod(sizes.values())):
            want, got = _want(rank, sizes), _places(subject, rank, sizes)
            if got != want:
                first = tuple(reversed(_want(rank, dict(reversed(sizes.items())))))
                why = ": the first axis is the fastest here" if got == first else ""
                raise CriterionNotMet(f"rank {rank} of {sizes}: want {dict(zip(sizes, want))}, got "
                                      f"{dict(zip(sizes, got))}{why}")


@neighbours.criterion("a rank is one of its own line", "property")
def _(subject):
    for sizes, rank, axis, got in _lines(subject):
        if rank not in got or len(got) != sizes[axis]:
            raise CriterionNotMet(f"rank {rank} of {sizes}, {axis}: got {got}, want {sizes[axis]} ranks, "
                                  f"{rank} among them")


@neighbours.criterion("those that differ on this axis alone", "parity")
def _(subject):
    for sizes, rank, axis, got in _lines(subject):
        want = _line(rank, axis, sizes)
        if got != want:
            stretch = [rank - rank % sizes[axis] + k for k in range(sizes[axis])]
            why = ("in the axis's own order, from place 0" if sorted(got) == want else
                   "ranks side by side: so it is on the fastest axis alone" if got == stretch else
                   "how far apart are two neighbours? As far as all faster axes reach")
            raise CriterionNotMet(f"rank {rank} of {sizes}, {axis}: want {want}, got {got}: {why}")


@neighbours.criterion("the real mesh's", "parity")
def _(subject):
    for sizes in MESHES:
        named = dict(zip(("pp", "dp", "tp"), sizes))
        for rank, axes in enumerate(_runs(_real, sizes)):
            for axis, want in axes.items():
                if (got := list(subject(rank, axis, named))) != want:
                    raise CriterionNotMet(f"rank {rank} of {named}, {axis}: the real mesh has {want}, got "
                                          f"{got}")


@sum_gradients.criterion("leaves alone what it is given", "property")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_sums, sizes, subject)):
            if run["changed"]:
                raise CriterionNotMet(f"rank {rank}: micro-batch {run['changed'][0]}'s `{run['changed'][1]}` "
                                      "is overwritten: all_reduce and += work in place, so begin with a sum "
                                      "of your own")


@sum_gradients.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_sums, sizes, subject)):
            at, got = run["at"], run["grads"]
            where = f"{_on(sizes)}, stage {at[0]}"
            if set(got) != set(cases.names(sizes[0], at[0])):
                missing = sorted(set(cases.names(sizes[0], at[0])) ^ set(got))
                raise CriterionNotMet(f"rank {rank} {where}: the names are not those given: "
                                      f"{', '.join(missing[:3])}")
            for name in cases.names(sizes[0], at[0]):
                assert_same_tensor(f"{name} {where}", got[name], cases.total(name, sizes, at[2]), rank, 1,
                                   1e-10, cases.slips(name, sizes, at))


@sum_gradients.criterion("each number travels once on each axis it must", "resource")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_sums, sizes, subject)):
            for axis, want in _must(sizes, run["at"]).items():
                got = sum(row.payload_bytes for row in run["rows"] if row.axis_name in _ALIASES[axis])
                if got != want:
                    m = cases.MICRO_BATCHES
                    why = ("after each micro-batch? Add them up first, then send the sum" if got == m * want
                           else "which parameters does this axis have to sum?")
                    raise CriterionNotMet(f"rank {rank} {_on(sizes)} sends {got:,} bytes on {axis}, want "
                                          f"{want:,}: {why}")


@grad_norm.criterion("the same number on every rank", "property")
def _(subject):
    for sizes in MESHES:
        runs = _runs(_norms, sizes, subject)
        for rank, run in enumerate(runs):
            if not isinstance(run["norm"], float):
                raise CriterionNotMet(f"rank {rank}: grad_norm returns {run['norm']!r}, want a float: no "
                                      "return, or no .item()?")
        for rank, run in enumerate(runs):
            if run["norm"] != runs[0]["norm"]:
                _off(rank, run, sizes, runs[0]["norm"], "rank 0 has ")


@grad_norm.criterion("leaves alone what it is given", "property")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_norms, sizes, subject)):
            if run["changed"]:
                raise CriterionNotMet(f"rank {rank}: `{run['changed']}` is overwritten, and the optimizer's "
                                      "to use")


@grad_norm.criterion("the whole model's norm, to 1e-10", "parity")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_norms, sizes, subject)):
            if not abs(run["norm"] / cases.norm(sizes) - 1) <= 1e-10:
                _off(rank, run, sizes, cases.norm(sizes), "want ")


@grad_norm.criterion("one number on tp, one on pp", "resource")
def _(subject):
    for sizes in MESHES:
        for rank, run in enumerate(_runs(_norms, sizes, subject)):
            sent = sum(row.payload_bytes for row in run["rows"])
            if sent > 16 or len(run["rows"]) > 2:
                raise CriterionNotMet(f"rank {rank} {_on(sizes)} sends {sent:,} bytes in {len(run['rows'])} "
                                      "calls; want 8 on tp and 8 on pp: square and add at home, then sum "
                                      "one number")


_ALIASES = {"dp": ("dp", "data"), "tp": ("tp",), "pp": ("pp",)}


def _places(subject, rank, sizes):
    got = subject(rank, dict(sizes))
    if not isinstance(got, dict) or set(got) != set(sizes):
        raise CriterionNotMet(f"rank {rank} of {sizes}: got {got!r}, want a dict with a place on "
                              f"{', '.join(sizes)}")
    for axis, n in sizes.items():
        if not (isinstance(got[axis], int) and 0 <= got[axis] < n):
            raise CriterionNotMet(f"rank {rank} of {sizes}: place {got[axis]!r} on {axis}, want one of 0 to "
                                  f"{n - 1}")
    return tuple(got[axis] for axis in sizes)


def _want(rank, sizes):
    grid = torch.arange(math.prod(sizes.values())).view(*sizes.values())
    return tuple((grid == rank).nonzero()[0].tolist())


def _line(rank, axis, sizes):
    grid = torch.arange(math.prod(sizes.values())).view(*sizes.values())
    at = [slice(None) if name == axis else place for name, place in zip(sizes, _want(rank, sizes))]
    return grid[tuple(at)].tolist()


def _lines(subject):
    for sizes in ORDERS:
        for rank in range(math.prod(sizes.values())):
            for axis in sizes:
                got = subject(rank, axis, dict(sizes))
                if not isinstance(got, list | tuple | range):
                    raise CriterionNotMet(f"rank {rank} of {sizes}, {axis}: got {got!r}, "
                                          "want a list of ranks")
                yield sizes, rank, axis, list(got)


def _on(sizes):
    return "on pp {} x dp {} x tp {}".format(*sizes)


def _off(rank, run, sizes, want, whose):
    causes = cases.norm_slips(sizes, run["at"]).items()
    why = next((f": {cause}" for cause, value in causes if abs(run["norm"] / value - 1) < 1e-9), "")
    why = why or ": rounding: squared in a narrower dtype?" * (abs(run["norm"] / want - 1) < 1e-5)
    raise CriterionNotMet(f"rank {rank} {_on(sizes)}: {whose}{want:.10g}, got {run['norm']:.10g}{why}")


def _must(sizes, at):
    """{axis: bytes that a rank's gradients make there}."""
    held = {name: 8 * cases.total(name, sizes, at[2]).numel() for name in cases.names(sizes[0], at[0])}
    norms = sum(size for name, size in held.items() if cases.is_norm(name))
    every = {"pp": held.get(TIED, 0), "dp": sum(held.values()), "tp": norms}
    return {axis: size * (n > 1) for (axis, size), n in zip(every.items(), sizes)}


@functools.lru_cache(maxsize=16)
def _runs(work, sizes, *args):
    """What `work(sizes, *args)` did on each of eight ranks, kept for the next criterion."""
    try:
        return rank_pool_for_checks(8).run(work, sizes, *args)
    except RankFailedError as error:
        why = next((cause for sign, cause in ENDED.items() if sign in str(error)), None)
        if why is None:
            raise
        raise CriterionNotMet(f"{_on(sizes)}: {why}\n{error}") from error


def _real(sizes):
    mesh = Mesh(*sizes[:2], tp=sizes[2])
    return {axis: list(getattr(mesh, axis).global_ranks) for axis in ("pp", "dp", "tp")}


def _sums(sizes, subject):
    mesh = Mesh(*sizes[:2], tp=sizes[2])
    micro, ends = cases.micro(mesh), mesh.first_last_subgroup("pp")
    got = subject(micro, mesh, ends)
    changed = [(k, name) for k, (now, then) in enumerate(zip(micro, cases.micro(mesh)))
               for name in then if not torch.equal(now[name], then[name])]
    return {"at": _at(mesh), "grads": {name: grad.clone() for name, grad in dict(got or {}).items()},
            "changed": changed and changed[0], "rows": mesh.comm_log.take_records()}


def _norms(sizes, subject):
    mesh = Mesh(*sizes[:2], tp=sizes[2])
    at, ends = _at(mesh), mesh.first_last_subgroup("pp")
    grads = {name: cases.total(name, sizes, at[2]).clone() for name in cases.names(sizes[0], at[0])}
    norm = subject(grads, mesh, ends)
    changed = [name for name, grad in grads.items() if not torch.equal(grad, cases.total(name, sizes, at[2]))]
    return {"at": at, "norm": norm, "changed": changed and changed[0], "rows": mesh.comm_log.take_records()}


def _at(mesh):
    return mesh.pp.rank, mesh.dp.rank, mesh.tp.rank
