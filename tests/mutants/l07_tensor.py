"""Known-wrong tensor parallelism, each one slip away from right."""
import torch
import torch.nn.functional as F

from nanoinfra.dist import comm
from nanoinfra.lab.checks import l07_tensor as check
from nanoinfra.lab.mutants import Mutant


def shared(up, up_bias, down, down_bias, axis, dims=(0, 0, 1, None), place=lambda axis: axis.rank,
           own=torch.Tensor.clone):
    """The right one, with a place for each slip."""
    return tuple(own(x if dim is None else x.chunk(axis.size, dim)[place(axis)])
                 for x, dim in zip((up, up_bias, down, down_bias), dims))


def cuts_up_along_inputs(*args):
    return shared(*args, dims=(1, None, 0, 0))


def cuts_both_along_outputs(up, up_bias, down, down_bias, axis):
    parts = shared(up, up_bias, down, down_bias, axis, dims=(0, 0, None, None))
    return *parts[:2], down[:len(down) // axis.size].clone(), parts[3]


def cuts_the_bias_of_down(up, up_bias, down, down_bias, axis):
    return *shared(up, up_bias, down, down_bias, axis)[:3], down_bias[:len(down_bias) // axis.size].clone()


def keeps_the_bias_of_up_whole(*args):
    return shared(*args, dims=(0, None, 1, None))


def gives_every_rank_the_first_stretch(*args):
    return shared(*args, place=lambda axis: 0)


def deals_out_backwards(*args):
    return shared(*args, place=lambda axis: axis.size - 1 - axis.rank)


def gives_views(*args):
    return shared(*args, own=lambda x: x)


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


def never_sums(*args):
    return parallel(*args, leave=lambda y, axis, times: y)


def adds_the_bias_on_each_rank(*args):
    return parallel(*args, inside=args[4], after=lambda y, bias, axis: y)


def forgets_the_bias(*args):
    return parallel(*args, after=lambda y, bias, axis: y)


def averages(*args):
    return parallel(*args, after=lambda y, bias, axis: y / axis.size + bias)


def sums_in_float32(*args):
    return parallel(*args, leave=lambda y, axis, times: Leave.apply(y.float(), axis, times).double())


def has_no_sum_in_backward(*args):
    return parallel(*args, back=0)


def sums_gradients_twice(*args):
    return parallel(*args, twice=1)


def adds_the_bias_on_one_rank(*args):
    axis = args[-1]
    return parallel(*args, inside=args[4] if axis.rank == 0 else None, after=lambda y, bias, axis: y)


def takes_torchs_own_gradient_of_a_sum(*args):
    return parallel(*args, back=0, twice=1)


def sums_the_bias_too(*args):
    return parallel(*args, inside=args[4] / args[-1].size, after=lambda y, bias, axis: y)


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


def loss(logits, targets, start, axis, top=lambda x, axis: comm.all_reduce(x, axis, op="max"), back=True,
         total=comm.all_reduce, astray=False, onehot=1, rows=1, gather=False, wide=False):
    """The right one, with a place for each slip. Returns (loss, gradient)."""
    if gather:
        comm.all_gather(F.pad(logits, (0, -logits.shape[1] % 12)), axis)
    most = top(logits.max(1).values, axis)                                     # (N,)
    shifted = (logits - most[:, None]).exp()                                   # (N, V/t)
    sums = total(shifted.sum(1), axis)
    mine, at = (targets >= start) & (targets < start + logits.shape[1]), targets - start
    at = at.where(mine, 0)[:, None]
    score = comm.all_reduce(logits.gather(1, at)[:, 0] * mine, axis)
    if wide:
        F.one_hot(targets)
    grad = shifted / sums[:, None]
    grad.scatter_add_(1, at, -onehot * (mine | astray)[:, None].to(grad.dtype))
    return sums.log() + (most if back else 0) - score, grad / rows


def misses_the_maximum(*args):
    return loss(*args, top=lambda x, axis: torch.zeros_like(x))


def clamps_at_zero(*args):
    return loss(*args, top=lambda x, axis: comm.all_reduce(x.clamp(max=0), axis, op="max"))


def takes_its_own_maximum(*args):
    return loss(*args, top=lambda x, axis: x)


def sums_its_own_columns(*args):
    return loss(*args, total=lambda x, axis: x)


def forgets_to_add_the_maximum(*args):
    return loss(*args, back=False)


def forgets_the_target(*args):
    return loss(*args, onehot=0)


def takes_1_off_in_another_column(*args):
    return loss(*args, astray=True)


def averages_over_rows(*args):
    return loss(*args, rows=len(args[1]))


def gathers_all_logits(*args):
    return loss(*args, gather=True)


def sends_row_by_row(*args):
    def total(x, axis):
        return torch.stack([comm.all_reduce(row, axis) for row in x])
    return loss(*args, total=total)


def makes_a_onehot_of_all_columns(*args):
    return loss(*args, wide=True)


SHAPES, STRETCH, OWN = (criterion.name for criterion in check.share.criteria)
ALIKE, OUTPUT, GRADS, ONCE, NARROW = (criterion.name for criterion in check.tensor_mlp.criteria)
SAME, FINITE, LOSS, GRAD, THREE, NOBODY = (criterion.name for criterion in check.vocab_loss.criteria)
SHARE = {cuts_up_along_inputs: SHAPES, cuts_both_along_outputs: SHAPES, cuts_the_bias_of_down: SHAPES,
         keeps_the_bias_of_up_whole: SHAPES, gives_every_rank_the_first_stretch: STRETCH,
         deals_out_backwards: STRETCH, gives_views: OWN}
MLP = {never_sums: ALIKE, adds_the_bias_on_each_rank: OUTPUT, forgets_the_bias: OUTPUT, averages: OUTPUT,
       sums_in_float32: OUTPUT, has_no_sum_in_backward: GRADS, sums_gradients_twice: GRADS,
       adds_the_bias_on_one_rank: GRADS, takes_torchs_own_gradient_of_a_sum: GRADS, sums_the_bias_too: GRADS,
       gathers_hidden: ONCE, reads_twice: ONCE, pads_hidden: NARROW}
LOSS_OF = {takes_its_own_maximum: SAME, sums_its_own_columns: SAME, misses_the_maximum: FINITE,
           clamps_at_zero: FINITE, forgets_to_add_the_maximum: LOSS,
           forgets_the_target: GRAD, takes_1_off_in_another_column: GRAD, averages_over_rows: GRAD,
           gathers_all_logits: THREE, sends_row_by_row: THREE, makes_a_onehot_of_all_columns: NOBODY}
MUTANTS = [Mutant(variant.__name__.replace("_", " "), judge, variant, rejected_by)
           for judge, variants in ((check.share, SHARE), (check.tensor_mlp, MLP), (check.vocab_loss, LOSS_OF))
           for variant, rejected_by in variants.items()]
