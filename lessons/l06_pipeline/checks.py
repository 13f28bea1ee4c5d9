"""Checks of lesson 06: two pipeline schedules on the simulator, and an executor on real ranks."""
import functools

from lessons.l06_pipeline import cases
from lessons.l06_pipeline.measurements import schedule_of_order
from nanoinfra.distributed.pool.rank_pool import RankFailedError
from nanoinfra.formulas import pipeline as formulas
from nanoinfra.lab.check import Check, CriterionNotMet, rank_pool_for_checks
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.parallel.pipeline.schedules import Backward, BackwardInput, BackwardWeight, Forward
from nanoinfra.parallel.pipeline.simulator import max_micro_batches_in_flight, simulate_schedule

PREDICTIONS = {**{f"L06.idle_{what}": "slots" for what in ("1f1b", "interleaved", "zb", "zb_wide")},
               **{f"L06.{what}": "B" for what in ("held_gpipe", "held_1f1b", "sent_1f1b",
                                                  "sent_interleaved")},
               **{f"L06.step_{what}": "s" for what in ("1f1b", "interleaved", "zb")}}
one_f_one_b = Check("one_f_one_b")
zero_bubble = Check("zero_bubble")
run_stage = Check("run_stage")
CHECKS = (one_f_one_b, zero_bubble, run_stage)
SIZES = [(p, m) for p in (2, 3, 4, 1) for m in (4, 8, 3, 1)]         # stages, micro-batches
TIMES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3), (3, 2, 2)]      # slots: forward, to input, to weights
STEPS = [("1f1b", 2, 3), ("1f1b", 4, 5), ("gpipe", 4, 4), ("1f1b", 1, 2)]
ENDED = {                                    # what is in a RankFailedError: the usual cause
    "gave no answer": "ranks wait for each other: a send blocks until the other end receives, so send with "
                      "async_op=True and wait for all of them at the end; or a message never leaves",
    "NoneType": "no gradient for what came over the wire? It has no history: .requires_grad_() it first",
    "a leaf Variable": "what came over the wire is written to after .requires_grad_()? Receive, then ask"}


@one_f_one_b.criterion("each micro-batch forward, then backward, once", "property")
def _(subject):
    _once(subject, [Forward, Backward])


@zero_bubble.criterion("each micro-batch forward, to the input, to the weights, once", "property")
def _(subject):
    _once(subject, [Forward, BackwardInput, BackwardWeight])


@one_f_one_b.criterion("nobody waits for ever", "property")
@zero_bubble.criterion("nobody waits for ever", "property")
def _(subject):
    for p, m in SIZES:
        _replayed(subject, p, m, (1, 1, 1))


@one_f_one_b.criterion("holds min(m, p - r) micro-batches", "resource")
def _(subject):
    _held(subject, "1f1b", "all forwards first, as GPipe? Stage r goes p - 1 - r forwards ahead, then takes "
                           "turns: a forward, a backward")


@zero_bubble.criterion("holds min(m, p) micro-batches", "resource")
def _(subject):
    _held(subject, "zb-h1", "weights put off too long? 1F1B holds p - r on stage r, so r are left to put off")


@one_f_one_b.criterion("idles (p-1)(F+B+W)", "resource")
def _(subject):
    _idle(subject, "1f1b", "too few forwards ahead? Those behind need work while the first one comes back")


@zero_bubble.criterion("idles (p-1) max(F, B, F+B-W)", "resource")
def _(subject):
    _idle(subject, "zb-h1", "weights put off too little? Whoever works at them lets the next gradient wait")


@run_stage.criterion("does what the order says, and no more", "property")
def _(subject):
    for kind, n, m in STEPS:
        for rank, run in enumerate(_runs(subject, kind, n, m)):
            want = [(type(what).__name__, what.micro_batch) for what in run["order"]]
            if run["did"] != want:
                i = next((i for i, pair in enumerate(zip(run["did"], want)) if pair[0] != pair[1]),
                         min(len(want), len(run["did"])))
                got, asked = (_word(each[i]) if i < len(each) else "nothing" for each in (run["did"], want))
                raise CriterionNotMet(f"stage {rank} of {n}, {kind}, {m} micro-batches: computation {i} is "
                                      f"{got}, want {asked}, the order's")


@run_stage.criterion("one rank's gradients, to 1e-10", "parity")
def _(subject):
    for kind, n, m in STEPS:
        wants, first, last = cases.one_rank(m), cases.share(m, 0), cases.share(m, m - 1)
        for rank, run in reversed([*enumerate(_runs(subject, kind, n, m))]):
            for name, got in run["grads"].items():
                want = wants[name]
                causes = {"micro-batch 0 is not in it": want - first[name], "of the last alone?": last[name],
                          "divided by the micro-batches? The loss is divided already": want / m}
                _same(f"{name}.grad, stage {rank} of {n}, {kind}", got, want, rank, m, causes, rank < n - 1)


@run_stage.criterion("a message a border, there and back", "resource")
def _(subject):
    for kind, n, m in STEPS:
        for rank, run in enumerate(_runs(subject, kind, n, m)):
            sends = [row.payload_bytes for row in run["rows"] if row.op == "send"]
            got, want = (len(sends), sum(sends)), cases.sent(n, rank, m)
            if got != want:
                raise CriterionNotMet(f"stage {rank} of {n} sends {got[1]:,} bytes in {got[0]} messages, "
                                      f"want {want[1]:,} in {want[0]}: of {m} micro-batches the stream to "
                                      "the next stage and the gradient to the one before, once each")


@run_stage.criterion("a micro-batch is let go by its backward", "resource")
def _(subject):
    for kind, n, m in STEPS:
        for rank, run in enumerate(_runs(subject, kind, n, m)):
            # a local may still name one
            if run["most"] > (want := max_micro_batches_in_flight(run["order"])) + 1:
                raise CriterionNotMet(f"stage {rank} of {n}, {kind}: {run['most']} micro-batches are alive "
                                      f"at once, the order needs {want}: kept after their backward? "
                                      "kept.pop(k)")


@run_stage.criterion("stages work at the same time", "speed")
def _(subject):
    n, m = 4, 4
    least, serial = 3 * cases.NAP * (m + n - 1), 3 * cases.NAP * m * n
    walls = []
    for trial in range(9):                             # other programs may be in the way of some
        runs = _runs(subject, "gpipe", n, m, cases.NAP, trial)
        begins, ends = zip(*(run["span"] for run in runs))
        walls.append(max(ends) - min(begins))
        if walls[-1] < (least + serial) / 2:
            return
    raise CriterionNotMet(f"{m} micro-batches on {n} stages take {min(walls):.2f} s, {least:.2f} by the "
                          f"clock and {serial:.2f} one stage at a time: who waits for whom, without need?")


def _same(name, got, want, rank, m, causes, behind):
    """`behind`: there are stages behind this one, and theirs are right."""
    try:
        assert_same_tensor(name, got, want, rank, m, 1e-10, causes)
    except CriterionNotMet as wrong:
        back = ": right on the stages behind: is x.grad what they send back?"
        raise CriterionNotMet(f"{wrong}{back if behind and str(wrong).endswith(')') else ''}") from None


def _once(subject, kinds):
    names = [kind.__name__ for kind in kinds]
    for p, m in SIZES:
        for r in range(p):
            order = _order(subject, p, r, m)
            where = f"stage {r} of {p}, {m} micro-batches"
            for what in order:
                if type(what) not in kinds:
                    raise CriterionNotMet(f"{where}: {what!r} is none of {', '.join(names)}")
                if what.micro_batch not in range(m):
                    raise CriterionNotMet(f"{where}: {type(what).__name__}({what.micro_batch}), and "
                                          f"micro-batches are 0 to {m - 1}: fewer than stages behind?")
            for k in range(m):
                did = [type(what).__name__ for what in order if what.micro_batch == k]
                if did != names:
                    raise CriterionNotMet(f"{where}: micro-batch {k} goes "
                                          f"{', then '.join(did) or 'nowhere'}; want {', then '.join(names)}")


def _held(subject, kind, cause):
    for p, m in SIZES:
        for r in range(p):
            got = max_micro_batches_in_flight(_order(subject, p, r, m))
            want = formulas.predicted_micro_batches_in_flight(kind, p, r, m)
            if got > want:
                raise CriterionNotMet(f"stage {r} of {p}, {m} micro-batches: holds {got} at once, want "
                                      f"{want}: {cause}")


def _idle(subject, kind, cause):
    for p, m in SIZES:
        for F, B, W in TIMES:
            if kind == "zb-h1" and m < p and W > min(F, B):
                continue                     # no closed form
            want = formulas.pipeline_idle_seconds(kind, p, m, F, B, W)
            found = _replayed(subject, p, m, (F, B, W)).idle_seconds
            if max(found) > want:
                raise CriterionNotMet(f"stage {found.index(max(found))} of {p}, {m} micro-batches, F, B, W = "
                                      f"{F}, {B}, {W}: idles {max(found)} slots, want {want}: {cause}")


def _order(subject, p, r, m):
    order = subject(p, r, m)
    if order is None:
        raise CriterionNotMet(f"returns None for stage {r} of {p}, want computations one after another: no "
                              "yield?")
    return list(order)


def _replayed(subject, p, m, times):
    try:
        return simulate_schedule(schedule_of_order(subject, p, m), *times)
    except ValueError as error:
        raise CriterionNotMet(f"{p} stages, {m} micro-batches: {error} (stage, computation)") from error


def _word(pair):
    return f"{pair[0]}({pair[1]})"


@functools.lru_cache(maxsize=8)
def _runs(subject, kind, n, m, nap=0.0, trial=0):
    """What `subject` did on each of n ranks, kept for the next criterion: n of 4, rows side by side."""
    try:
        return rank_pool_for_checks(4).run(cases.step, subject, n, kind, m, nap)[::4 // n]
    except RankFailedError as error:
        why = next((cause for sign, cause in ENDED.items() if sign in str(error)), None)
        if why is None:
            raise
        raise CriterionNotMet(f"{kind} on {n} stages, {m} micro-batches: {why}\n{error}") from error
