"""Known-wrong ZeRO: each has one mistake that a check must find."""
from math import ceil

import torch

from lessons.l08_zero import checks as check
from lessons.l08_zero.cases import cut
from nanoinfra.distributed import comm
from nanoinfra.lab.mutants import Mutant


def scattered(grad, axis):
    return comm.reduce_scatter(cut(grad, axis.size), axis)


def gathered(rows, axis, like):
    return comm.all_gather(rows, axis).flatten(0, 1)[:len(like)]


def one_step(params, grads, axis, state, make, cut=cut, scatter=scattered, gather=gathered, remake=False):
    """The right one, with a place for each slip."""
    if not state or remake:
        state["rows"] = {name: cut(p, axis.size)[axis.rank].clone() for name, p in params.items()}
        state["optimizer"] = make(list(state["rows"].values()))
    for name, rows in state["rows"].items():
        rows.grad = scatter(grads[name], axis)
    state["optimizer"].step()
    for name, p in params.items():
        whole = gather(state["rows"][name], axis, p)
        p[:len(whole)].copy_(whole)


def leaves_the_others_rows_as_they_were(params, grads, axis, state, make):
    def gather(rows, axis, like):
        whole, c = like.clone(), len(rows)
        mine = whole[axis.rank * c:(axis.rank + 1) * c]
        mine.copy_(rows[:len(mine)])
        return whole
    one_step(params, grads, axis, state, make, gather=gather)


def gathers_what_was_before_the_step(params, grads, axis, state, make):
    old = {name: p.clone() for name, p in params.items()}
    one_step(params, grads, axis, state, make)
    for name, p in params.items():
        p.copy_(old[name])


def returns_new_weights(params, grads, axis, state, make):
    new = {name: p.clone() for name, p in params.items()}
    one_step(new, grads, axis, state, make)
    return new


def moves_by_its_own_gradient(*args):
    one_step(*args, scatter=lambda grad, axis: cut(grad, axis.size)[axis.rank])


def takes_the_gradient_of_rank_0(*args):
    one_step(*args, scatter=lambda grad, axis: cut(comm.broadcast(grad.clone(), axis), axis.size)[axis.rank])


def averages(*args):
    one_step(*args, scatter=lambda grad, axis: scattered(grad, axis) / axis.size)


def makes_the_optimizer_anew(*args):
    one_step(*args, remake=True)


def forgets_the_padding(params, grads, axis, state, make):
    def floor(x, n):
        c = max(1, len(x) // n)
        rows = x.new_zeros(n * c, *x.shape[1:])
        rows[:len(x)] = x[:n * c]
        return rows.view(n, c, *x.shape[1:])
    one_step(params, grads, axis, state, make, floor,
             lambda grad, axis: comm.reduce_scatter(floor(grad, axis.size), axis))


def moves_in_float32(*args):
    one_step(*args, scatter=lambda grad, axis: scattered(grad.float(), axis).double())


def has_an_optimizer_for_all_rows(params, grads, axis, state, make):
    if not state:
        state["optimizer"] = make(list(params.values()))
    for name, p in params.items():
        p.grad = gathered(scattered(grads[name], axis), axis, p)
    state["optimizer"].step()


def keeps_the_whole_sum(params, grads, axis, state, make):
    one_step(params, grads, axis, state, make)
    state["whole"] = {name: torch.stack([grad] * axis.size) for name, grad in grads.items()}


def all_reduced(grad, axis):
    return cut(comm.all_reduce(grad.clone(), axis), axis.size)[axis.rank].clone()


def all_reduces(*args):
    one_step(*args, scatter=all_reduced)


def reduces_twice(*args):
    one_step(*args, scatter=lambda grad, axis: (scattered(grad, axis) + scattered(grad, axis)) / 2)


def gathers_row_by_row(*args):
    def gather(rows, axis, like):
        return torch.stack([comm.all_gather(row, axis) for row in rows], 1).flatten(0, 1)[:len(like)]
    one_step(*args, gather=gather)


def stage3(module, axis, shards, grads, frees=lambda p: True, back=True, last=True, forget=True,
           gather=gathered, scatter=scattered, add=torch.Tensor.add_, again=False):
    """The right one, with a place for each slip."""
    params = dict(module.named_parameters())

    def enter(*_):
        for name, p in params.items():
            p.untyped_storage().resize_(p.nbytes)
            p.data.copy_(gather(shards[name], axis, p))

    def free():
        for p in filter(frees, params.values()):
            p.untyped_storage().resize_(0)

    def leave(module, inputs, output):
        free()
        if back:
            output.register_hook(enter)

    def arrive(name, p):
        add(grads[name], scatter(p.grad, axis))
        if again:
            gather(shards[name], axis, p)
        if forget:
            p.grad = None
        if last and frees(p):
            p.untyped_storage().resize_(0)

    free()
    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    for name, p in params.items():
        p.register_post_accumulate_grad_hook(lambda p, name=name: arrive(name, p))


def gathers_for_forward_alone(*args):
    stage3(*args, back=False)


def takes_its_own_rows_for_all(*args):
    stage3(*args, gather=lambda rows, axis, like: torch.cat([rows] * axis.size)[:len(like)])


def gathers_rows_as_they_were_at_first(module, axis, shards, grads):
    stage3(module, axis, {name: shard.clone() for name, shard in shards.items()}, grads)


def forgets_all_but_the_last_micro_batch(*args):
    stage3(*args, add=torch.Tensor.copy_)


def reduces_a_gradient_twice(*args):
    stage3(*args, forget=False)


def pads_in_front(*args):
    def scatter(grad, axis):
        c = ceil(len(grad) / axis.size)
        zeros = grad.new_zeros(axis.size * c - len(grad), *grad.shape[1:])
        return comm.reduce_scatter(torch.cat([zeros, grad]).view(axis.size, c, *grad.shape[1:]), axis)
    stage3(*args, scatter=scatter)


def never_frees(*args):
    stage3(*args, frees=lambda p: False)


def frees_after_forward_alone(*args):
    stage3(*args, last=False)


def keeps_gradients_whole(module, axis, shards, grads):
    total = {}

    def scatter(grad, axis):
        total[grad.shape, len(total)] = grad
        return scattered(grad, axis)
    stage3(module, axis, shards, grads, scatter=scatter)


def all_reduces_gradients(*args):
    stage3(*args, scatter=all_reduced)


def gathers_once_more_in_backward(*args):
    stage3(*args, again=True)


ALIKE, ONE, STATE, ONCE = (criterion.name for criterion in check.zero1_step.criteria)
THERE, OUTPUT, ONE_TOO, FREED, ROWS, SENT = (criterion.name for criterion in check.zero3.criteria)
STAGE1 = {leaves_the_others_rows_as_they_were: ALIKE, gathers_what_was_before_the_step: ONE,
          returns_new_weights: ONE, moves_by_its_own_gradient: ONE, takes_the_gradient_of_rank_0: ONE,
          averages: ONE, makes_the_optimizer_anew: ONE, forgets_the_padding: ONE, moves_in_float32: ONE,
          has_an_optimizer_for_all_rows: STATE, keeps_the_whole_sum: STATE, all_reduces: ONCE,
          reduces_twice: ONCE, gathers_row_by_row: ONCE}
STAGE3 = {gathers_for_forward_alone: THERE, takes_its_own_rows_for_all: OUTPUT,
          gathers_rows_as_they_were_at_first: OUTPUT, forgets_all_but_the_last_micro_batch: ONE_TOO,
          reduces_a_gradient_twice: ONE_TOO, pads_in_front: ONE_TOO, never_frees: FREED,
          frees_after_forward_alone: FREED, keeps_gradients_whole: ROWS, all_reduces_gradients: SENT,
          gathers_once_more_in_backward: SENT}
MUTANTS = [Mutant(variant.__name__.replace("_", " "), judge, variant, rejected_by)
           for judge, variants in ((check.zero1_step, STAGE1), (check.zero3, STAGE3))
           for variant, rejected_by in variants.items()]
