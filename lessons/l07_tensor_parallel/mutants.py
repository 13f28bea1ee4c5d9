"""Known-wrong tensor parallelism: each has one mistake that a check must find."""
from functools import partial

import torch
import torch.nn.functional as F

from lessons.l07_tensor_parallel import checks as check
from nanoinfra.distributed import comm
from nanoinfra.lab.mutants import Mutant


def shared(up, up_bias, down, down_bias, axis, dims=(0, 0, 1, None), place=lambda axis: axis.rank,
           own=torch.Tensor.clone):
    """The right one, with a place for each slip."""
    return tuple(own(x if dim is None else x.chunk(axis.size, dim)[place(axis)])
                 for x, dim in zip((up, up_bias, down, down_bias), dims))


cuts_up_along_inputs = partial(shared, dims=(1, None, 0, 0))


def cuts_both_along_outputs(up, up_bias, down, down_bias, axis):
    parts = shared(up, up_bias, down, down_bias, axis, dims=(0, 0, None, None))
    return *parts[:2], down[:len(down) // axis.size].clone(), parts[3]


def cuts_the_bias_of_down(up, up_bias, down, down_bias, axis):
    return *shared(up, up_bias, down, down_bias, axis)[:3], down_bias[:len(down_bias) // axis.size].clone()


keeps_the_bias_of_up_whole = partial(shared, dims=(0, None, 1, None))
gives_every_rank_the_first_stretch = partial(shared, place=lambda axis: 0)
deals_out_backwards = partial(shared, place=lambda axis: axis.size - 1 - axis.rank)
gives_views = partial(shared, own=lambda x: x)


def deals_out_unit_by_unit(up, up_bias, down, down_bias, axis):
    mine = slice(axis.rank, None, axis.size)
    return up[mine].clone(), up_bias[mine].clone(), down[:, mine].clone(), down_bias


def gives_the_bias_of_down_to_rank_0(*args):
    parts = shared(*args)
    return *parts[:3], parts[3] * (args[-1].rank == 0)


def divides_the_bias_of_down(*args):
    parts = shared(*args)
    return *parts[:3], parts[3] / args[-1].size


def one_sum(there, back):
    """f or g, made of what it does with (tensor, axis) forward and backward."""
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, axis):
            ctx.axis = axis
            return there(x, axis)

        @staticmethod
        def backward(ctx, grad):
            return back(grad, ctx.axis), None
    return Sum


def same(x, axis):
    return x.view_as(x)


def summed(x, axis):
    return comm.all_reduce(x.clone(), axis)


f_sums_in_place = one_sum(same, comm.all_reduce)
g_sums_in_place = one_sum(comm.all_reduce, same)
f_is_nothing = one_sum(same, same)
f_is_g = one_sum(summed, same)
f_sums_twice = one_sum(same, lambda grad, axis: summed(summed(grad, axis), axis))
g_is_f = one_sum(same, summed)
g_sums_both_ways = one_sum(summed, summed)
g_is_a_mean = one_sum(lambda y, axis: summed(y, axis) / axis.size, same)


class Enter(torch.autograd.Function):
    """f: nothing forward, `times` all-reduces backward."""

    @staticmethod
    def forward(ctx, x, axis, times):
        ctx.axis, ctx.times = axis, times
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        for _ in range(ctx.times):
            grad = comm.all_reduce(grad.clone(), ctx.axis)
        return grad, None, None


class Leave(torch.autograd.Function):
    """g: an all-reduce forward, `times` backward."""

    @staticmethod
    def forward(ctx, y, axis, times):
        ctx.axis, ctx.times = axis, times
        return comm.all_reduce(y.clone(), axis)

    @staticmethod
    def backward(ctx, grad):
        for _ in range(ctx.times):
            grad = comm.all_reduce(grad.clone(), ctx.axis)
        return grad, None, None


def parallel(x, up, up_bias, down, down_bias, axis, back=1, twice=0, read=Enter.apply, leave=Leave.apply,
             act=F.gelu, inside=None, after=lambda y, bias, axis: y + bias):
    """The right one, with a place for each slip."""
    hidden = act(F.linear(read(x, axis, back), up, up_bias))
    return after(leave(F.linear(hidden, down, inside), axis, twice), down_bias, axis)


never_sums = partial(parallel, leave=lambda y, axis, times: y)


def adds_the_bias_on_each_rank(*args):
    return parallel(*args, inside=args[4], after=lambda y, bias, axis: y)


forgets_the_bias = partial(parallel, after=lambda y, bias, axis: y)
averages = partial(parallel, after=lambda y, bias, axis: y / axis.size + bias)
sums_in_float32 = partial(parallel, leave=lambda y, axis, times: Leave.apply(y.float(), axis, times).double())
has_no_sum_in_backward = partial(parallel, back=0)
sums_gradients_twice = partial(parallel, twice=1)


def adds_the_bias_on_one_rank(*args):
    axis = args[-1]
    return parallel(*args, inside=args[4] if axis.rank == 0 else None, after=lambda y, bias, axis: y)


takes_torchs_own_gradient_of_a_sum = partial(parallel, back=0, twice=1)


def sums_the_bias_too(*args):
    return parallel(*args, inside=args[4] / args[-1].size, after=lambda y, bias, axis: y)


lets_the_bias_through_f = partial(parallel, after=lambda y, bias, axis: y + Enter.apply(bias, axis, 1))
applies_f_twice = partial(parallel, back=2)
reads_by_g_and_leaves_by_f = partial(parallel, read=lambda x, axis, times: Leave.apply(x, axis, 0),
                                     leave=lambda y, axis, times: Enter.apply(y, axis, 1))
calls_all_reduce_itself = partial(parallel, leave=lambda y, axis, times: comm.all_reduce(y.clone(), axis))
takes_gelu_after_g = partial(parallel, act=lambda x: x, after=lambda y, bias, axis: F.gelu(y) + bias)
takes_gelu_by_tanh = partial(parallel, act=lambda x: F.gelu(x, approximate="tanh"))


def gathers_hidden(x, up, up_bias, down, down_bias, axis):
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, mine):
            ctx.n = mine.shape[-1]
            return comm.all_gather(mine, axis).movedim(0, -2).flatten(-2)

        @staticmethod
        def backward(ctx, grad):
            return grad.narrow(-1, axis.rank * ctx.n, ctx.n)

    def act(mine):
        return Gather.apply(F.gelu(mine)).narrow(-1, axis.rank * mine.shape[-1], mine.shape[-1])
    return parallel(x, up, up_bias, down, down_bias, axis, act=act)


def reads_twice(*args):
    x, axis = args[0], args[-1]
    return parallel(Enter.apply(x, axis, 1) / 2 + Enter.apply(x, axis, 1) / 2, *args[1:], back=0)


def pads_hidden(*args):
    def act(mine):
        n = mine.shape[-1]
        return F.pad(F.gelu(mine), (0, args[-1].size * n))[..., :n]
    return parallel(*args, act=act)


def loss(logits, targets, start, axis, top=lambda x, axis: comm.all_reduce(x, axis, op="max"), back=1,
         total=comm.all_reduce, astray=False, onehot=1, rows=1, gather=False, wide=False, hit=comm.all_reduce,
         local=False, foreign=False, raw=False):
    """The right one, with a place for each slip. Returns (loss, gradient)."""
    if gather:
        comm.all_gather(F.pad(logits, (0, -logits.shape[1] % 12)), axis)
    most = top(logits.max(1).values, axis)                                     # (R,)
    z = logits - most[:, None]                                                 # (R, V/t)
    sums = total(z.exp().sum(1), axis)
    mine, at = (targets >= start) & (targets < start + logits.shape[1]), targets - start
    at = at.where(mine, 0)[:, None]
    score = hit((logits if raw else z).gather(1, at)[:, 0] * (mine | foreign), axis)
    if wide:
        F.one_hot(targets)
    grad = z.softmax(1) if local else z.exp() / sums[:, None]
    grad.scatter_add_(1, at, -onehot * (mine | astray)[:, None].to(grad.dtype))
    return sums.log() - score + raw * back * most, grad / rows


misses_the_maximum = partial(loss, top=lambda x, axis: torch.zeros_like(x))
clamps_at_zero = partial(loss, top=lambda x, axis: comm.all_reduce(x.clamp(max=0), axis, op="max"))
takes_its_own_maximum = partial(loss, top=lambda x, axis: x, raw=True)
sums_its_own_columns = partial(loss, total=lambda x, axis: x)
forgets_to_add_the_maximum = partial(loss, raw=True, back=0)
takes_its_own_maximum_off = partial(loss, top=lambda x, axis: x)
keeps_the_targets_logit = partial(loss, hit=lambda x, axis: x)
counts_column_0_of_others = partial(loss, foreign=True)


def divides_the_columns_evenly(logits, targets, start, axis):
    return loss(logits, targets, axis.rank * (comm.all_reduce(torch.tensor(logits.shape[1]), axis).item()
                                              // axis.size), axis)


takes_the_softmax_of_its_own_columns = partial(loss, local=True)


def overwrites_the_targets(logits, targets, start, axis):
    return loss(logits, targets.sub_(start), 0, axis)


def overwrites_the_logits(logits, targets, start, axis):
    most = comm.all_reduce(logits.max(1).values, axis, op="max")
    return loss(logits.sub_(most[:, None]), targets, start, axis)


def makes_no_call_without_a_target(logits, targets, start, axis):
    own = ((targets >= start) & (targets < start + logits.shape[1])).any()
    return loss(logits, targets, start, axis, hit=lambda x, axis: comm.all_reduce(x, axis) if own else x)


def sums_the_exponentials_themselves(*args):
    return loss(*args, total=lambda x, axis: comm.all_reduce(args[0].exp(), axis).sum(1))


forgets_the_target = partial(loss, onehot=0)
takes_1_off_in_another_column = partial(loss, astray=True)


def averages_over_rows(*args):
    return loss(*args, rows=len(args[1]))


gathers_all_logits = partial(loss, gather=True)


def sends_row_by_row(*args):
    def total(x, axis):
        return torch.stack([comm.all_reduce(row, axis) for row in x])
    return loss(*args, total=total)


makes_a_onehot_of_all_columns = partial(loss, wide=True)


SHAPES, STRETCH, OWN = (criterion.name for criterion in check.share.criteria)
APART, BACKWARD = (criterion.name for criterion in check.enter.criteria)
FORWARD = check.leave.criteria[1].name
ALIKE, OUTPUT, GRADS, ONCE, NARROW = (criterion.name for criterion in check.tensor_mlp.criteria)
SAME, FINITE, GIVEN, LOSS, GRAD, EACH, THREE, NOBODY = (each.name for each in check.vocab_loss.criteria)
SHARE = {cuts_up_along_inputs: SHAPES, cuts_both_along_outputs: SHAPES, cuts_the_bias_of_down: SHAPES,
         keeps_the_bias_of_up_whole: SHAPES, gives_every_rank_the_first_stretch: STRETCH,
         deals_out_backwards: STRETCH, deals_out_unit_by_unit: STRETCH,
         gives_the_bias_of_down_to_rank_0: STRETCH, divides_the_bias_of_down: STRETCH, gives_views: OWN}
F_OF = {f_sums_in_place: APART, f_is_nothing: BACKWARD, f_is_g: BACKWARD, f_sums_twice: BACKWARD}
G_OF = {g_sums_in_place: APART, g_is_f: FORWARD, g_sums_both_ways: FORWARD, g_is_a_mean: FORWARD}
MLP = {never_sums: ALIKE, calls_all_reduce_itself: ALIKE, reads_by_g_and_leaves_by_f: ALIKE,
       adds_the_bias_on_each_rank: OUTPUT, forgets_the_bias: OUTPUT, averages: OUTPUT,
       takes_gelu_after_g: OUTPUT, takes_gelu_by_tanh: OUTPUT, sums_in_float32: OUTPUT,
       has_no_sum_in_backward: GRADS, applies_f_twice: GRADS, lets_the_bias_through_f: GRADS,
       sums_gradients_twice: GRADS, adds_the_bias_on_one_rank: GRADS, sums_the_bias_too: GRADS,
       takes_torchs_own_gradient_of_a_sum: GRADS, gathers_hidden: ONCE, reads_twice: ONCE,
       pads_hidden: NARROW}
LOSS_OF = {takes_its_own_maximum: SAME, sums_its_own_columns: SAME, keeps_the_targets_logit: SAME,
           sums_the_exponentials_themselves: SAME, misses_the_maximum: FINITE, clamps_at_zero: FINITE,
           overwrites_the_logits: GIVEN, overwrites_the_targets: GIVEN, forgets_to_add_the_maximum: LOSS,
           takes_its_own_maximum_off: LOSS, counts_column_0_of_others: LOSS, divides_the_columns_evenly: LOSS,
           forgets_the_target: GRAD, takes_1_off_in_another_column: GRAD, averages_over_rows: GRAD,
           takes_the_softmax_of_its_own_columns: GRAD, makes_no_call_without_a_target: EACH,
           gathers_all_logits: THREE, sends_row_by_row: THREE, makes_a_onehot_of_all_columns: NOBODY}


NAMES = {id(variant): name.replace("_", " ") for name, variant in list(globals().items())}
MUTANTS = [Mutant(NAMES[id(variant)], judge, variant, rejected_by)
           for judge, variants in ((check.share, SHARE), (check.enter, F_OF), (check.leave, G_OF),
                                   (check.tensor_mlp, MLP), (check.vocab_loss, LOSS_OF))
           for variant, rejected_by in variants.items()]
