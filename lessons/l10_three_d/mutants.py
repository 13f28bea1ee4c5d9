"""Known-wrong composition: each has one mistake that a check must find."""
from functools import partial
from math import prod

import torch

from lessons.l10_three_d import checks as check
from lessons.l10_three_d.cases import MICRO_BATCHES, TIED, is_norm
from nanoinfra.distributed import comm
from nanoinfra.lab.mutants import Mutant


def places(rank, sizes):
    """The right one."""
    found = {}
    for axis, n in reversed(sizes.items()):
        rank, found[axis] = divmod(rank, n)
    return found


def takes_the_first_axis_for_the_fastest(rank, sizes):
    found = {}
    for axis, n in sizes.items():
        rank, found[axis] = divmod(rank, n)
    return found


def divides_the_rank_itself_each_time(rank, sizes):
    return {axis: rank % n for axis, n in sizes.items()}


def counts_from_1(rank, sizes):
    return {axis: place + 1 for axis, place in places(rank, sizes).items()}


def knows_tp_fastest_alone(rank, sizes):
    order = sorted(sizes, key=("pp", "dp", "tp").index)
    return places(rank, {axis: sizes[axis] for axis in order})


def leaves_out_the_last_axis(rank, sizes):
    return {axis: place for axis, place in places(rank, sizes).items() if axis != list(sizes)[-1]}


def line(rank, axis, sizes):
    """The right one."""
    names = list(sizes)
    stride = prod(sizes[name] for name in names[names.index(axis) + 1:])
    first = rank - places(rank, sizes)[axis] * stride
    return [first + k * stride for k in range(sizes[axis])]


def takes_those_side_by_side(rank, axis, sizes):
    first = rank - rank % sizes[axis]
    return [first + k for k in range(sizes[axis])]


def begins_with_me(rank, axis, sizes):
    found = line(rank, axis, sizes)
    me = found.index(rank)
    return found[me:] + found[:me]


def leaves_me_out(rank, axis, sizes):
    return [other for other in line(rank, axis, sizes) if other != rank]


def takes_all_at_my_place(rank, axis, sizes):
    me = places(rank, sizes)[axis]
    return [other for other in range(prod(sizes.values())) if places(other, sizes)[axis] == me]


def strides_over_slower_axes(rank, axis, sizes):
    names = list(sizes)
    stride, n = prod(sizes[name] for name in names[:names.index(axis)]), prod(sizes.values())
    first = rank - places(rank, sizes)[axis] * stride
    return sorted((first + k * stride) % n for k in range(sizes[axis]))


def sums(micro, mesh, ends, begin=None, over_dp=lambda x, axis: comm.all_reduce(x, axis), norms=True,
         matrices=False, tied=1, divide=1, chosen=slice(None), each=False):
    """The right one, with a place for each slip."""
    grads = {}
    for name in micro[0]:
        total = begin(micro, name) if begin else sum(m[name] for m in micro[chosen]).clone() / divide
        if each:
            total = sum(over_dp(m[name].clone(), mesh.dp) for m in micro)
        else:
            over_dp(total, mesh.dp)
        if (norms and is_norm(name)) or (matrices and not is_norm(name)):
            comm.all_reduce(total, mesh.tp)
        for _ in range(tied if name == TIED and ends else 0):
            comm.all_reduce(total, ends)
        grads[name] = total
    return grads


def adds_up_in_place(micro, name):
    for more in micro[1:]:
        micro[0][name] += more[name]
    return micro[0][name].clone()


sums_into_the_first_micro_batch = partial(sums, begin=adds_up_in_place)
sums_the_first_micro_batch_in_place = partial(sums, begin=lambda micro, name: micro[0][name])
divides_by_the_micro_batches_once_more = partial(sums, divide=MICRO_BATCHES)
takes_the_last_micro_batch_alone = partial(sums, chosen=slice(-1, None))
forgets_the_data_ranks = partial(sums, over_dp=lambda x, axis: x)
averages_over_data_ranks = partial(sums, over_dp=lambda x, axis: comm.all_reduce(x, axis).div_(axis.size))
forgets_norms_over_tp = partial(sums, norms=False)
sums_matrices_over_tp = partial(sums, matrices=True)
forgets_the_tied_weight = partial(sums, tied=0)
sums_the_tied_weight_twice = partial(sums, tied=2)
sums_each_micro_batch_over_dp = partial(sums, each=True)


def averages_norms_over_tp(micro, mesh, ends):
    return {name: grad / mesh.tp.size if is_norm(name) else grad
            for name, grad in sums(micro, mesh, ends).items()}


def forgets_the_names_of_norms(micro, mesh, ends):
    return {name: grad for name, grad in sums(micro, mesh, ends).items() if not is_norm(name)}


def sums_twice_and_halves(micro, mesh, ends):
    first, second = sums(micro, mesh, ends), sums(micro, mesh, ends)
    return {name: (first[name] + second[name]) / 2 for name in first}


def norm(grads, mesh, ends, norms=True, tied=True, axes=("tp", "pp"), root=True, narrow=False, each=False,
         own=False):
    """The right one, with a place for each slip."""
    def counts(name):
        if is_norm(name):
            return mesh.tp.rank == 0 or not norms
        return name != TIED or not tied or ends.rank == 0
    dtype = torch.float32 if narrow else torch.float64
    squares = [grad.to(dtype).square().sum() if counts(name) else torch.zeros((), dtype=dtype)
               for name, grad in grads.items()]
    if each:
        squares = [comm.all_reduce(square, mesh.tp) for square in squares]
    squares = [sum(squares)]
    for axis in axes[each:]:
        squares = [comm.all_reduce(square.clone(), getattr(mesh, axis)) for square in squares]
    if own:
        for grad in grads.values():
            grad.square_()
    return sum(squares).item() ** (0.5 if root else 1)


counts_norms_on_every_tp_rank = partial(norm, norms=False)
counts_the_tied_weight_at_both_ends = partial(norm, tied=False)
counts_both_as_often_as_they_are_there = partial(norm, norms=False, tied=False)
sums_over_data_ranks_too = partial(norm, axes=("tp", "pp", "dp"))
forgets_the_other_stages = partial(norm, axes=("tp",))
forgets_the_other_tensor_ranks = partial(norm, axes=("pp",))
forgets_the_root = partial(norm, root=False)
squares_in_float32 = partial(norm, narrow=True)
squares_in_place = partial(norm, own=True)
sends_a_number_for_each_tensor = partial(norm, each=True)


def adds_up_norms(grads, mesh, ends):
    def counts(name):
        return mesh.tp.rank == 0 if is_norm(name) else name != TIED or ends.rank == 0
    total = sum(grad.norm() for name, grad in grads.items() if counts(name))
    return comm.all_reduce(comm.all_reduce(total, mesh.tp), mesh.pp).item()


def sends_whole_gradients(grads, mesh, ends):
    found = norm(grads, mesh, ends)
    comm.all_gather(torch.cat([grad.flatten() for grad in grads.values()])[:50], mesh.tp)
    return found


def gives_a_tensor(grads, mesh, ends):
    return torch.tensor(norm(grads, mesh, ends))


OWN, FASTEST = (criterion.name for criterion in check.coordinates.criteria)
MINE, ALONE, REAL = (criterion.name for criterion in check.neighbours.criteria)
GIVEN, SUMS, ONCE = (criterion.name for criterion in check.sum_gradients.criteria)
ALIKE, LEFT, NORM, NUMBER = (criterion.name for criterion in check.grad_norm.criteria)
COORDINATES = {takes_the_first_axis_for_the_fastest: FASTEST, divides_the_rank_itself_each_time: OWN,
               counts_from_1: OWN, knows_tp_fastest_alone: FASTEST, leaves_out_the_last_axis: OWN}
NEIGHBOURS = {takes_those_side_by_side: ALONE, begins_with_me: ALONE, leaves_me_out: MINE,
              takes_all_at_my_place: MINE, strides_over_slower_axes: ALONE}
SUMMED = {sums_into_the_first_micro_batch: GIVEN, sums_the_first_micro_batch_in_place: GIVEN,
          divides_by_the_micro_batches_once_more: SUMS, takes_the_last_micro_batch_alone: SUMS,
          forgets_the_data_ranks: SUMS, averages_over_data_ranks: SUMS, forgets_norms_over_tp: SUMS,
          sums_matrices_over_tp: SUMS, forgets_the_tied_weight: SUMS, sums_the_tied_weight_twice: SUMS,
          averages_norms_over_tp: SUMS, forgets_the_names_of_norms: SUMS,
          sums_each_micro_batch_over_dp: ONCE, sums_twice_and_halves: ONCE}
NORMED = {forgets_the_other_stages: ALIKE, forgets_the_other_tensor_ranks: ALIKE, gives_a_tensor: ALIKE,
          squares_in_place: LEFT, counts_norms_on_every_tp_rank: NORM, forgets_the_root: NORM,
          counts_the_tied_weight_at_both_ends: NORM, sums_over_data_ranks_too: NORM,
          counts_both_as_often_as_they_are_there: NORM, squares_in_float32: NORM, adds_up_norms: NORM,
          sends_a_number_for_each_tensor: NUMBER, sends_whole_gradients: NUMBER}
NAMES = {id(variant): name.replace("_", " ") for name, variant in list(globals().items())}
MUTANTS = [Mutant(NAMES[id(variant)], judge, variant, rejected_by)
           for judge, variants in ((check.coordinates, COORDINATES), (check.neighbours, NEIGHBOURS),
                                   (check.sum_gradients, SUMMED), (check.grad_norm, NORMED))
           for variant, rejected_by in variants.items()]
