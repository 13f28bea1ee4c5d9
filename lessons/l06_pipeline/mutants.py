"""Known-wrong pipelines: each has one mistake that a check must find."""
from functools import partial

import torch

from lessons.l06_pipeline import checks as check
from nanoinfra.distributed import comm
from nanoinfra.lab.mutants import Mutant
from nanoinfra.parallel.pipeline.schedules import Backward, BackwardInput, BackwardWeight, Forward


def turns(p, r, m, ahead=lambda p, r, m: min(m, p - 1 - r), late=False,
          name=lambda k, r, m: k):
    """1F1B, with a place for each slip."""
    n = ahead(p, r, m)
    yield from (Forward(name(k, r, m)) for k in range(n))
    for k in range(m):
        if late:
            yield Backward(name(k, r, m))
        if n + k < m:
            yield Forward(name(n + k, r, m))
        if not late:
            yield Backward(name(k, r, m))


def is_gpipe(p, r, m):
    yield from (Forward(k) for k in range(m))
    yield from (Backward(k) for k in range(m))


waits_for_each_to_come_back = partial(turns, ahead=lambda p, r, m: 0)
goes_r_ahead = partial(turns, ahead=lambda p, r, m: min(m, r))
goes_one_ahead_too_few = partial(turns, ahead=lambda p, r, m: min(m, max(0, p - 2 - r)))
goes_one_ahead_too_many = partial(turns, ahead=lambda p, r, m: min(m, p - r))
goes_p_ahead_everywhere = partial(turns, ahead=lambda p, r, m: min(m, p - 1))
forgets_that_m_may_be_small = partial(turns, ahead=lambda p, r, m: p - 1 - r)
sends_back_before_it_goes_forward = partial(turns, late=True)
turns_round_on_odd_stages = partial(turns, name=lambda k, r, m: m - 1 - k if r % 2 else k)


def misses_the_last_micro_batch(p, r, m):
    yield from (what for what in turns(p, r, m) if what.micro_batch < m - 1)


def forgets_to_drain(p, r, m):
    yield from list(turns(p, r, m))[:2 * m - min(m, p - 1 - r)]


def returns_nothing(p, r, m):
    list(turns(p, r, m))


def halves(p, r, m, off=lambda p, r, m: r, drain=True, swapped=False):
    """Zero bubble, with a place for each slip: stage r puts weights off by `off` micro-batches."""
    ahead, off = min(m, p - 1 - r), off(p, r, m)
    first, second = (BackwardWeight, BackwardInput) if swapped else (BackwardInput, BackwardWeight)
    yield from (Forward(k) for k in range(ahead))
    for k in range(m):
        if ahead + k < m:
            yield Forward(ahead + k)
        yield first(k)
        if k >= off:
            yield second(k - off)
    if drain:
        yield from (second(k) for k in range(max(0, m - off), m))


never_puts_off = partial(halves, off=lambda p, r, m: 0)
puts_all_off_to_the_end = partial(halves, off=lambda p, r, m: m)
puts_off_by_p_everywhere = partial(halves, off=lambda p, r, m: p - 1)
puts_off_by_p_less_r = partial(halves, off=lambda p, r, m: p - 1 - r)
forgets_what_it_put_off = partial(halves, drain=False)
does_weights_first = partial(halves, swapped=True)


def does_not_split(p, r, m):
    yield from turns(p, r, m)


def puts_off_a_micro_batch_too_few(p, r, m):
    yield from halves(p, r, m, off=lambda p, r, m: max(0, r - 1))


def does_inputs_when_all_is_forward(p, r, m):
    yield from (Forward(k) for k in range(m))
    yield from (BackwardInput(k) for k in range(m))
    yield from (BackwardWeight(k) for k in range(m))


def goes_forward_and_back_in_turn(p, r, m):
    for k in range(m):
        yield from (Forward(k), BackwardInput(k), BackwardWeight(k))


def stage(order, stage, axis, send=comm.send, recv=comm.recv, async_op=True, pop=dict.pop, forget=False,
          leaf=lambda x: x.requires_grad_(), take=lambda grad: grad, gradient=lambda x, y: x.grad,
          after=lambda axis: None):
    """The right executor, with a place for each slip."""
    kept, sent, r = {}, [], axis.rank
    for what in order:
        k = what.micro_batch
        if isinstance(what, Forward):
            x = stage.enter(k) if stage.first else leaf(recv(stage.place(k), axis, r - 1))
            y = stage.run(x, k)
            kept[k] = x, y
            if not stage.last:
                sent.append(send(y.detach(), axis, r + 1, async_op=async_op))
        else:
            x, y = pop(kept, k)
            if forget:
                stage.chunk.zero_grad()
            grad = None if stage.last else take(recv(stage.place(k), axis, r + 1))
            y.backward(grad)
            if not stage.first:
                sent.append(send(gradient(x, y), axis, r - 1, async_op=async_op))
        after(axis)
    if async_op:
        for one in sent:
            one.wait()


def waits_for_every_send(order, stage_, axis):
    stage(order, stage_, axis, async_op=False)


def gives_no_history(*args):
    stage(*args, leaf=lambda x: x)


def sends_in_float32(*args):
    stage(*args, send=lambda x, axis, to,
          async_op: comm.send(x.float().double(), axis, to, async_op=async_op))


def sends_the_stream_back(*args):
    stage(*args, gradient=lambda x, y: x.detach())


def sends_no_gradient(*args):
    stage(*args, gradient=lambda x, y: torch.zeros_like(x))


def divides_what_comes_back(order, stage_, axis):
    m = len(stage_.batches)
    stage(order, stage_, axis, take=lambda grad: grad / m)


def forgets_earlier_micro_batches(*args):
    stage(*args, forget=True)


def misses_a_micro_batch(order, stage_, axis):
    stage([what for what in order if what.micro_batch < len(stage_.batches) - 1], stage_, axis)


def takes_them_one_at_a_time(order, stage_, axis):
    stage(sorted(order, key=lambda what: what.micro_batch), stage_, axis)


def runs_all_forwards_first(order, stage_, axis):
    stage(sorted(order, key=lambda what: not isinstance(what, Forward)), stage_, axis)


def never_lets_go(*args):
    stage(*args, pop=lambda kept, k: kept[k])


def sends_everything_twice(*args):
    def recv(x, axis, source):
        return comm.recv(torch.cat([x, x]), axis, source)[:len(x)]
    stage(*args, recv=recv, send=lambda x, axis, to,
          async_op: comm.send(torch.cat([x, x]), axis, to, async_op=async_op))


def waits_for_all_after_each(*args):
    stage(*args, after=comm.barrier)


ONCE, GO_ON, HELD, IDLE = (criterion.name for criterion in check.one_f_one_b.criteria)
HALVES, GO_ON_TOO, HELD_TOO, IDLE_TOO = (criterion.name for criterion in check.zero_bubble.criteria)
ORDER, GRADS, SENT, FREED, BUSY = (criterion.name for criterion in check.run_stage.criteria)
TURNS = {is_gpipe: HELD, waits_for_each_to_come_back: IDLE, goes_r_ahead: GO_ON, goes_one_ahead_too_few: IDLE,
         goes_one_ahead_too_many: HELD, goes_p_ahead_everywhere: HELD, forgets_that_m_may_be_small: ONCE,
         sends_back_before_it_goes_forward: ONCE, turns_round_on_odd_stages: GO_ON,
         misses_the_last_micro_batch: ONCE, forgets_to_drain: ONCE, returns_nothing: ONCE}
SPLIT = {never_puts_off: IDLE_TOO, puts_all_off_to_the_end: HELD_TOO, puts_off_by_p_everywhere: HELD_TOO,
         puts_off_by_p_less_r: HELD_TOO, forgets_what_it_put_off: HALVES, does_weights_first: HALVES,
         does_not_split: HALVES, puts_off_a_micro_batch_too_few: IDLE_TOO,
         does_inputs_when_all_is_forward: HELD_TOO, goes_forward_and_back_in_turn: IDLE_TOO}
STAGE = {misses_a_micro_batch: ORDER, takes_them_one_at_a_time: ORDER, never_lets_go: FREED,
         waits_for_all_after_each: BUSY, runs_all_forwards_first: ORDER, gives_no_history: ORDER,
         sends_in_float32: GRADS, sends_the_stream_back: GRADS, sends_no_gradient: GRADS,
         divides_what_comes_back: GRADS, forgets_earlier_micro_batches: GRADS, sends_everything_twice: SENT,
         waits_for_every_send: ORDER}


NAMES = {id(variant): name.replace("_", " ") for name, variant in list(globals().items())}
MUTANTS = [Mutant(NAMES[id(variant)], judge, variant, rejected_by)
           for judge, variants in ((check.one_f_one_b, TURNS), (check.zero_bubble, SPLIT),
                                   (check.run_stage, STAGE))
           for variant, rejected_by in variants.items()]
