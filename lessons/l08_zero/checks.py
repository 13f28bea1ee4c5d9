"""Checks of lesson 08: an optimizer step on sharded states, and a module unsharded only while it runs."""
import functools
import time

import torch

from lessons.l08_zero import cases
from lessons.l08_zero.cases import MICRO_BATCHES, SHAPES, STEPS
from nanoinfra.distributed.mesh import Mesh, world_size
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks, scale_timeout_by_load
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes

PREDICTIONS = {**{f"L08.{what}_{stage}": "B" for what in ("held", "sent") for stage in (1, 2, 3)},
               "L08.server": "B", "L08.wait_simple": "s", "L08.wait_ahead": "s"}
zero1_step = Check("zero1_step")
zero3 = Check("zero3")
CHECKS = (zero1_step, zero3)


@zero1_step.criterion("the same weights on every rank", "property")
def _(subject):
    for n in (3, 4):
        runs = _runs(_step, n, subject)
        for rank, run in enumerate(runs):
            for name, want in runs[0]["params"].items():
                mine = "only your own rows have moved: gather the others' after the step"
                got = run["params"][name]
                causes = {cases.STILL: cases.moved(n)[0][name],
                          mine: cases.own_rows_moved(got, name, rank, n)}
                assert_same_tensor(f"{name}, against rank 0", got, want, rank, n, likely_causes=causes)


@zero1_step.criterion("one rank's weights, to 1e-10", "parity")
def _(subject):
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_runs(_step, n, subject)):
            for name, want in cases.moved(n)[-1].items():
                causes = {text: slip[name] for text, slip in cases.step_slips(n).items()}
                assert_same_tensor(f"{name} after {STEPS} steps on {n} rank{'s' * (n > 1)}",
                                   run["params"][name], want, rank, max(n, 2), 1e-10, causes)


@zero1_step.criterion("optimizer state for your own rows alone", "resource")
def _(subject):
    for rank, run in enumerate(_runs(_step, 4, subject, cases.ADAM)):
        if run["kept"] > (limit := cases.state_limit(4)):
            raise CriterionNotMet(f"rank {rank} of 4 keeps {run['kept']:,} bytes after a step, want at most "
                                  f"{limit:,}: its rows, their gradient, Adam's two moments of them and its "
                                  "counters. Does the optimizer have other ranks' rows?")


@zero1_step.criterion("each gradient and each weight travels once", "resource")
def _(subject):
    for n in (3, 4):
        whole = STEPS * 8 * sum(cases.padded(shape, n) for shape in SHAPES.values())
        for rank, run in enumerate(_runs(_step, n, subject)):
            want = dict.fromkeys(("reduce_scatter", "all_gather"), (whole, STEPS * len(SHAPES)))
            _sent(run["rows"], want, f"rank {rank} of {n}, {STEPS} steps")


@zero3.criterion("whole whenever it is read", "property")
def _(subject):
    for rank, run in enumerate(_runs(_train, 4, subject)):
        if "read_freed" in run:
            raise CriterionNotMet(f"rank {rank}: a weight was read while it was freed: make it whole before "
                                  "forward, and again when a gradient comes back to the output")


@zero3.criterion("the module's own output", "property")
def _(subject):
    for rank, run in enumerate(_runs(_train, 4, subject)):
        for step, got in enumerate(run["outputs"]):
            want, old = (cases.alone(4, frozen)[0][step][rank] for frozen in (False, True))
            assert_same_tensor(f"output in step {step + 1}", torch.from_numpy(got), want, rank, 4, 1e-10,
                               {cases.OLD: old})


@zero3.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_runs(_train, n, subject)):
            for step, got in enumerate(run["grads"]):
                for name, want in cases.alone(n)[1][step].items():
                    slips = {text: cases.cut(slip[step][name], n)[rank]
                             for text, slip in cases.train_slips(n).items()}
                    assert_same_tensor(f"grads of {name} in step {step + 1}, {n} rank{'s' * (n > 1)}",
                                       torch.from_numpy(got[name]), cases.cut(want, n)[rank], rank, max(n, 2),
                                       1e-10, slips)


@zero3.criterion("no parameter is whole between uses", "resource")
def _(subject):
    for rank, run in enumerate(_runs(_train, 4, subject)):
        for when, held in run["whole"].items():
            if held:
                raise CriterionNotMet(f"rank {rank}: {when} the parameters hold {held:,} bytes, want 0: when "
                                      "a use is over, p.untyped_storage().resize_(0)")


@zero3.criterion("gradients are kept in rows alone", "resource")
def _(subject):
    for rank, run in enumerate(_runs(_train, 4, subject)):
        for micro, more in enumerate(run["more"]):
            if more > 0:
                raise CriterionNotMet(f"rank {rank}: after backward {micro + 1} there are {more:,} bytes "
                                      "besides `shards` and `grads`, want 0: p.grad = None when its rows "
                                      "have left; or is a whole sum kept somewhere?")


@zero3.criterion("two gathers and one scatter a micro-batch", "resource")
def _(subject):
    a, params = STEPS * MICRO_BATCHES, list(cases.model().parameters())
    psi = 8 * sum(cases.padded(p.shape, 4) for p in params)
    want = {"all_gather": (2 * a * psi, 2 * a * len(params)), "reduce_scatter": (a * psi, a * len(params))}
    for rank, run in enumerate(_runs(_train, 4, subject)):
        _sent(run["rows"], want, f"rank {rank} of 4, {a} micro-batches")


def _sent(rows, want, where):
    """`want`: {collective: (bytes, calls)}; calls may be fewer, where a student packs tensors."""
    for op in {row.op for row in rows} - set(want):
        raise CriterionNotMet(f"{where}: sends by {op} too; {' and '.join(want)} are enough")
    for op, (bytes_, calls) in want.items():
        got, made = sum(row.payload_bytes for row in rows if row.op == op), sum(row.op == op for row in rows)
        if got != bytes_:
            why = "left out?" if got < bytes_ else "something sent twice, or in a wider dtype?"
            raise CriterionNotMet(f"{where}: {op} carries {got:,} bytes, want {bytes_:,}: {why}")
        if made > calls:
            raise CriterionNotMet(f"{where}: {op} is called {made} times, want {calls}: each call pays the "
                                  "latency")


@functools.lru_cache(maxsize=8)
def _runs(work, n, *args):
    """What `work(n, *args)` did on each of n ranks, kept for the next criterion. One, two: rows of four."""
    return rank_pool_for_checks(3 if n == 3 else 4).run(work, n, *args)[:n]


def _step(n, subject, make=cases.SGD):
    mesh, params, state = Mesh(dp=n, pp=world_size() // n), cases.weights(), {}
    given = [cases.gradients(step, mesh.dp.rank) for step in range(STEPS)]
    with LiveTensorBytes() as storages:
        for grads in given:
            subject(params, grads, mesh.dp, state, make)
        kept = _held(storages, cases.state_limit(n), n == 4)
    return {"params": params, "kept": kept, "rows": mesh.comm_log.take_records()}


def _train(n, subject):
    """Two steps; after the first the rows move, so that old weights show."""
    mesh, net = Mesh(dp=n, pp=world_size() // n), cases.model()
    shards, grads = _given(net, mesh.dp, subject)
    run = {"outputs": [], "grads": [], "more": [], "whole": {"before the first use": _whole(net)}}
    cases.alone(n)                                                 # before anybody counts
    try:
        with LiveTensorBytes(initial_tensors=[*net.parameters(), *shards.values(),
                                              *grads.values()]) as storages:
            start = storages.live_bytes()
            for step in range(STEPS):
                for micro in range(MICRO_BATCHES):
                    y = _micro_batch(net, cases.batch(step, mesh.dp.rank, micro), step, run)
                    run["more"].append(_held(storages, start, n == 4 and not any(run["more"])) - start)
                    run["outputs"] += [y] if micro == 0 else []
                run["grads"].append({name: grad.numpy().copy() for name, grad in grads.items()})
                for name, want in cases.alone(n)[1][step].items():
                    shards[name] -= cases.RATE * cases.cut(want, n)[mesh.dp.rank]
                    grads[name].zero_()
    except RuntimeError as error:
        if "for storage of size 0" not in str(error):
            raise
        return {"read_freed": True}
    return run | {"rows": mesh.comm_log.take_records()}


def _given(net, axis, subject):
    """{name: rows} of weights and of gradients, still zeros; `subject` has had those of each module."""
    shards = {name: cases.cut(p.detach(), axis.size)[axis.rank].clone() for name, p in net.named_parameters()}
    grads = {name: torch.zeros_like(shard) for name, shard in shards.items()}
    for i, module in enumerate(net):
        names = [name for name, _ in module.named_parameters()]
        subject(module, axis, *({name: x[f"{i}.{name}"] for name in names} for x in (shards, grads)))
    return shards, grads


def _micro_batch(net, x, step, run):
    y = net(x)
    run["whole"][f"after the forward of step {step + 1}"] = _whole(net)
    y.square().sum().backward()
    run["whole"][f"after the backward of step {step + 1}"] = _whole(net)
    return y.detach().numpy().copy()


def _held(storages, limit, patient):
    """Bytes alive. Above `limit` look again: gloo's own thread lets go of what it sent a moment after."""
    until = time.monotonic() + scale_timeout_by_load(0.3) * patient
    while (held := storages.live_bytes()) > limit and time.monotonic() < until:
        time.sleep(1e-3)
    return held


def _whole(net):
    return sum(p.untyped_storage().nbytes() for p in net.parameters())
