"""Checks of lesson 07: a tensor-parallel MLP, its two all-reduces, and a vocabulary-parallel loss."""
import functools
from math import ceil

import torch

from lessons.l07_tensor_parallel import cases
from lessons.l07_tensor_parallel.cases import CUT, HIDDEN, NAMES, ROWS, VOCAB, B, C, T
from nanoinfra.distributed.comm_log import CommLog
from nanoinfra.distributed.mesh import MeshAxis
from nanoinfra.distributed.pool.rank_pool import RankFailedError
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor

PREDICTIONS = {"L07.calls": "calls", "L07.sent": "B", "L07.sent_gather": "B", "L07.loss": "B",
               **{f"L07.kept_{how}": "B" for how in ("one", "none", "keep", "gather")},
               "L07.step_inside": "s", "L07.step_between": "s"}
share = Check("share")
enter = Check("Enter")
leave = Check("Leave")
tensor_mlp = Check("tensor_mlp")
vocab_loss = Check("vocab_loss")
CHECKS = (share, enter, leave, tensor_mlp, vocab_loss)
ENDED = {                                    # what is in a RankFailedError: the usual cause
    "autograd kernel": "autograd sees no gradient of all_reduce: let Leave call it, as Leave.apply(y, axis)",
    "SIGABRT": "did ranks send different sizes? (R,) is everyone's; of columns, the last rank has fewer",
    "out of bounds": "a target of another rank is no column of yours: gather column 0 there, times 0",
    "gave no answer": "a rank waits in a call that another does not make: all make the same ones, those "
                      "without a target too"}


@share.criterion("up by outputs, down by inputs", "property")
def _(subject):
    for rank, n, name, got in _shared(subject):
        want = cases.part(name, rank, n)
        if got.shape != want.shape:
            raise CriterionNotMet(f"rank {rank} of {n}: `{name}` has shape {tuple(got.shape)}, want "
                                  f"{tuple(want.shape)}: {_misshapen(name, got)}")


@share.criterion("its own stretch, of both the same", "parity")
def _(subject):
    for rank, n, name, got in _shared(subject):
        others = (other for other in range(n) if other != rank and name in CUT)
        causes = {f"rank {other}'s stretch": cases.part(name, other, n) for other in others}
        causes |= cases.share_slips(name, rank, n)
        assert_same_tensor(f"{name} of {n} ranks", got, cases.part(name, rank, n), rank, 1,
                           likely_causes=causes)


@share.criterion("memory of its own", "resource")
def _(subject):
    for rank, n, name, got in _shared(subject):
        if n > 1 and name in CUT and (held := got.untyped_storage().nbytes()) > got.nbytes:
            raise CriterionNotMet(f"rank {rank} of {n}: `{name}` holds {held} bytes for its {got.nbytes}: a "
                                  "view keeps the whole matrix alive; .clone() the part")


@enter.criterion("leaves alone what it is given", "property")
@leave.criterion("leaves alone what it is given", "property")
def _(subject):
    for n in (2, 4):
        for rank, run in enumerate(_runs(cases.bare, n, subject)):
            for what, seed in (("input", 0), ("gradient", 1)):
                if not torch.equal(run[what], cases.partial(rank, seed)):
                    raise CriterionNotMet(f"rank {rank} of {n}: the {what} it was given is overwritten, and "
                                          "may be someone else's, say of a residual sum: "
                                          "all_reduce(x.clone(), axis)")


@enter.criterion("x forward, the gradients' sum backward", "parity")
def _(subject):
    _one_sum(subject, "backward")


@leave.criterion("the sum forward, the gradient as it is backward", "parity")
def _(subject):
    _one_sum(subject, "forward")


@tensor_mlp.criterion("the same output on every rank", "property")
def _(subject):
    for n in (3, 4):
        runs = _steps(n, subject)
        for rank, run in enumerate(runs):
            mine = cases.alone(rank, n)["y"]
            causes = {"f and g changed round? x enters by f, y leaves by g":
                      cases.alone(rank, n, n)["y"] + _bias(),
                      "your part of the sum alone: g is an all-reduce": mine,
                      "your part of the sum, and the bias: g is an all-reduce": mine + _bias()}
            assert_same_tensor("y, against rank 0", run["y"], runs[0]["y"], rank, n, likely_causes=causes)


@tensor_mlp.criterion("one rank's output, to 1e-10", "parity")
def _(subject):
    want = cases.one_rank()["y"]
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_steps(n, subject)):
            assert_same_tensor(f"y{_on(n)}", run["y"], want, rank, max(n, 2), 1e-10, cases.output_slips(n))


@tensor_mlp.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_steps(n, subject)):
            for name in (*NAMES, "x"):                       # x last: what is wrong there alone is f's
                got, want = run["grads"][name], cases.part(name, rank, n, cases.one_rank()["grads"][name])
                if got is None:
                    raise CriterionNotMet(f"rank {rank} of {n}: `{name}` has no gradient: every rank uses "
                                          "all it was given, and adds the bias of down to the sum")
                causes = cases.mlp_grad_slips(name, rank, n, want)
                assert_same_tensor(f"{name}.grad{_on(n)}", got, want, rank, max(n, 2), 1e-10, causes)


@tensor_mlp.criterion("one all-reduce forward, one backward", "resource")
def _(subject):
    size = 8 * B * T * C
    for n in (2, 4):
        for rank, run in enumerate(_steps(n, subject)):
            for way, rows in zip(("forward", "backward"), run["rows"]):
                if [(row.op, row.payload_bytes) for row in rows] != [("all_reduce", size)]:
                    said = ", ".join(f"{row.op} of {row.payload_bytes:,} bytes" for row in rows) or "nothing"
                    again = [row.op for row in rows] == ["all_reduce"] * len(rows) and len(rows) > 1
                    why = ("one f for all that reads x, one g for y" if again else
                           "GELU of your own part needs no other rank's")
                    raise CriterionNotMet(f"rank {rank} of {n} sends {way}: {said}; want one all_reduce of "
                                          f"{size} bytes, (B, T, C) once: {why}")


@tensor_mlp.criterion("nothing wider than its share", "resource")
def _(subject):
    for rank, run in enumerate(_steps(4, subject)):
        _narrow(rank, run, B * T * max(C, HIDDEN // 4), "hidden is (B, T, D/t), x and y are (B, T, C)")


@vocab_loss.criterion("the same loss on every rank", "property")
def _(subject):
    for n in (3, 4):
        runs = _scores(n, subject)
        for rank, run in enumerate(runs):
            causes = cases.own_slips(rank, n)
            assert_same_tensor("loss, against rank 0", run["loss"], runs[0]["loss"], rank, n,
                               likely_causes=causes)


@vocab_loss.criterion("finite where exp overflows", "property")
def _(subject):
    for shift in (800.0, -800.0):
        for rank, run in enumerate(_scores(4, subject, shift)):
            for name in ("loss", "grad"):
                off = (~run[name].isfinite()).nonzero()
                if len(off):
                    index = off[0].tolist()
                    raise CriterionNotMet(f"rank {rank}: `{name}` is {run[name][tuple(index)].item()} at "
                                          f"{index} for logits near {shift:g}: exp(x) is infinite above 709 "
                                          "and 0 below -745; take the maximum away first, that of all ranks")


@vocab_loss.criterion("leaves logits and targets alone", "property")
def _(subject):
    for rank, run in enumerate(_scores(4, subject)):
        given = cases.logits()[:, cases.columns(rank, 4)], cases.TARGETS
        for name, got, want in zip(("logits", "targets"), run["given"], given):
            if not torch.equal(got, want):
                raise CriterionNotMet(f"rank {rank} of 4: `{name}` is overwritten, and the caller's: `{name} "
                                      "- ...` makes a new tensor, where `-=` and `sub_` do not")


@vocab_loss.criterion("one rank's loss, to 1e-10", "parity")
def _(subject):
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_scores(n, subject)):
            assert_same_tensor(f"loss{_on(n)}", run["loss"], cases.one_loss()[0], rank, 1, 1e-10,
                               cases.loss_slips(n))


@vocab_loss.criterion("one rank's gradient, to 1e-10", "parity")
def _(subject):
    for n in (2, 3, 4, 1):
        for rank, run in enumerate(_scores(n, subject)):
            want = cases.one_loss()[1][:, cases.columns(rank, n)]
            assert_same_tensor(f"grad{_on(n)}", run["grad"], want, rank, 1, 1e-10, cases.grad_slips(rank, n))


@vocab_loss.criterion("also where one rank has all targets", "parity")
def _(subject):
    for n in (2, 4):
        for rank, run in enumerate(_scores(n, subject, 0.0, cases.LAST)):
            loss, grad = cases.one_loss(cases.LAST)
            assert_same_tensor(f"loss{_on(n)}", run["loss"], loss, rank, 1, 1e-10)
            assert_same_tensor(f"grad{_on(n)}", run["grad"], grad[:, cases.columns(rank, n)], rank, 1, 1e-10)


@vocab_loss.criterion("three numbers a row", "resource")
def _(subject):
    for n in (2, 4):
        for rank, run in enumerate(_scores(n, subject)):
            sent, most = sum(row.payload_bytes for row in run["rows"]), 3 * 8 * ROWS
            if sent > most or len(run["rows"]) > 3:
                raise CriterionNotMet(f"rank {rank} of {n} sends {sent:,} bytes in {len(run['rows'])} calls, "
                                      f"want {most} in 3: of each row the maximum, the sum and the target's "
                                      "logit")


@vocab_loss.criterion("nobody has all logits of a row", "resource")
def _(subject):
    for rank, run in enumerate(_scores(4, subject)):
        _narrow(rank, run, ROWS * ceil(VOCAB / 4), "(R, V/t)")


def _narrow(rank, run, limit, what):
    if (got := run["largest"]).numel() > limit:
        raise CriterionNotMet(f"rank {rank} of 4 makes a tensor {tuple(got.shape)}, {got.numel()} numbers, "
                              f"want at most {limit}: {what}")


def _bias():
    return cases.weights()["down_bias"]


def _on(n):
    return f" on {n} rank{'s' * (n > 1)}"


def _shared(subject):
    """(rank, of n, name, what `subject` gives it); no rank is needed for that."""
    for n in (2, 3, 4, 1):
        for rank in range(n):
            axis = MeshAxis("tp", rank, tuple(range(n)), None, CommLog())
            found = subject(*(tensor.clone() for tensor in cases.weights().values()), axis)
            if not isinstance(found, tuple | list) or [type(x) for x in found] != [torch.Tensor] * 4:
                raise CriterionNotMet(f"rank {rank} of {n}: share returns {type(found).__name__}, want four "
                                      f"tensors, {', '.join(NAMES)}: no return?")
            yield from ((rank, n, name, got) for name, got in zip(NAMES, found))


def _one_sum(subject, where):
    """f or g by itself: a sum over the ranks `where`, "forward" or "backward"; the other way nothing."""
    for n in (2, 4, 1):
        for rank, run in enumerate(_runs(cases.bare, n, subject)):
            for seed, way in enumerate(("forward", "backward")):
                parts = [cases.partial(r, seed) for r in range(n)]
                want, other = (sum(parts), parts[rank]) if way == where else (parts[rank], sum(parts))
                why = "the all-reduce is missing" if way == where else "no sum here: f and g changed round?"
                causes = {why: other, "a sum, not a mean": want / n, "summed twice?": want * n}
                assert_same_tensor(f"{way}{_on(n)}", run[way], want, rank, 1, 1e-10, causes)


def _misshapen(name, got):
    if name not in CUT:
        return "the bias of down is added to the sum: every rank has all of it"
    if got.shape == cases.weights()[name].shape:
        return "whole? That is what does not fit"
    return "a matrix is (outputs, inputs): cut along the other?" if got.dim() == 2 else "1/t of it"


@functools.lru_cache(maxsize=8)
def _runs(work, n, *args):
    """What `work(n, *args)` did on each of n ranks, kept for the next criterion. One, two: rows of four."""
    try:
        return rank_pool_for_checks(3 if n == 3 else 4).run(work, n, *args)[:n]
    except RankFailedError as error:
        why = next((cause for sign, cause in ENDED.items() if sign in str(error)), None)
        if why is None:
            raise
        said = "" if "autograd kernel" in str(error) else f"\n{error}"     # ten lines of torch's
        raise CriterionNotMet(f"on {n} ranks: {why}{said}") from error


def _steps(n, subject):
    runs = _runs(cases.step, n, subject)
    for rank, run in enumerate(runs):
        if not isinstance(run["y"], torch.Tensor):
            raise CriterionNotMet(f"rank {rank} of {n}: tensor_mlp returns {type(run['y']).__name__}, want y "
                                  f"(B, T, C): no return?")
    return runs


def _scores(n, subject, *case):
    runs = _runs(cases.score, n, subject, *case)
    for rank, run in enumerate(runs):
        if not (isinstance(run["loss"], torch.Tensor) and isinstance(run["grad"], torch.Tensor)):
            kinds = " and ".join(type(run[name]).__name__ for name in ("loss", "grad"))
            raise CriterionNotMet(f"rank {rank} of {n}: vocab_loss returns {kinds}, want loss (R,), grad (R, "
                                  "V/t): no return?")
    return runs
