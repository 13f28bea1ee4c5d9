"""Known-wrong recompute and known-wrong counts of bytes: each has one mistake that a check must find."""
from contextlib import nullcontext

import torch

from lessons.l04_recompute import checks as check
from nanoinfra.lab.mutants import Mutant


def recompute(fn, x, *rest, anchor=True, dice=True, put_back=True, detach=True, learns=True, home=None,
              runs=1, upstream=lambda grad: grad, give=lambda grad: grad, through=torch.autograd.backward,
              returns=2, keep=lambda x, out: (x,), first=torch.no_grad, again=torch.enable_grad):
    """The right one, with a place for each slip."""
    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor, x):
            ctx.dice = torch.get_rng_state()
            with first():
                out = fn(x, *rest)
            (home or ctx).x = x
            ctx.save_for_backward(*keep(x, out))
            return out.detach() if out.requires_grad else out

        @staticmethod
        def backward(ctx, grad):
            x = home.x if home else ctx.saved_tensors[0] if keep(1, 1) else ctx.x
            x = x.detach().requires_grad_(learns) if detach else x
            with again(), torch.random.fork_rng(devices=[]) if put_back else nullcontext():
                for _ in range(runs):
                    if dice:
                        torch.set_rng_state(ctx.dice)
                    out = fn(x, *rest)
            through(out, upstream(grad))
            return (None, give(x.grad))[:returns]
    return Recompute.apply(torch.zeros((), requires_grad=anchor), x)


def returns_nothing(fn, x, *rest):
    recompute(fn, x, *rest)


def runs_without_a_function(fn, x, *rest):
    with torch.no_grad():
        return fn(x, *rest)


def forgets_the_inputs_gradient(*args):
    return recompute(*args, give=lambda grad: None)


def takes_x_out_and_asks_no_gradient(*args):
    return recompute(*args, learns=False)


def runs_again_without_grad(*args):
    return recompute(*args, again=nullcontext)


def returns_too_few(*args):
    return recompute(*args, returns=1)


def forgets_what_came_from_above(*args):
    return recompute(*args, upstream=torch.ones_like)


def forgets_the_parameters(*args):
    """As torch.autograd.grad with respect to the input alone."""
    def input_alone(out, grad):
        raise NotImplementedError

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor, x):
            ctx.save_for_backward(x)
            return args[0](x, *args[2:])

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                out = args[0](x, *args[2:])
            return None, *torch.autograd.grad(out, x, grad)
    return Recompute.apply(torch.zeros((), requires_grad=True), args[1])


def goes_back_twice(*args):
    def twice(out, grad):
        torch.autograd.backward(out, grad, retain_graph=True)
        torch.autograd.backward(out, grad)
    return recompute(*args, through=twice)


def asks_whether_the_input_learns(*args):
    return recompute(*args, anchor=False)


class Shelf:
    """One place for all calls."""
    x = None


def keeps_the_last_input_for_all(*args):
    return recompute(*args, home=Shelf)


def rolls_new_dice(*args):
    return recompute(*args, dice=False)


def leaves_the_dice_as_they_fell(*args):
    return recompute(*args, put_back=False)


def keeps_everything(fn, *args):
    return fn(*args)


def keeps_the_graph_of_the_first_run(*args):
    return recompute(*args, first=torch.enable_grad)


def keeps_the_output_too(*args):
    return recompute(*args, keep=lambda x, out: (x, out))


def hides_the_input_on_ctx(*args):
    return recompute(*args, keep=lambda x, out: ())


def runs_three_times(*args):
    return recompute(*args, runs=2)


def kept(c, batch, seq, d, how, layers=None, heads=None, split=False, norms=2, statistics=2, qkv=1, hidden=2,
         inputs=2, squares=1, mask=1, full=1, selective=False):
    """The right count, with a place for each slip."""
    L, C, K, KV = layers or c.layers, c.width, c.width // c.heads if split else c.head_dim, c.kv_heads
    if how == "full":
        return L * batch * seq * full * C * d
    numbers = norms * C + 2 * statistics + inputs * C + hidden * c.hidden
    numbers += qkv * (c.heads + 2 * (heads or KV)) * K + c.heads * K
    pairs = squares * batch * c.heads * seq * seq * d + mask * seq * seq
    return L * (batch * seq * numbers * d + (pairs if how == "none" or selective else 0))


def slip(**change):
    return lambda c, batch, seq, d, how: kept(c, batch, seq, d, how, **change)


def per_layer(c, batch, seq, d, how):
    return kept(c, batch, seq, d, how, layers=1)


def counts_numbers(c, batch, seq, d, how):
    return kept(c, batch, seq, d, how) // d


def full_grouped(c, batch, seq, d, how):
    return kept(c, batch, seq, d, how, heads=c.heads)


def as_wide_as_the_model(c, batch, seq, d, how):
    return kept(c, batch, seq, d, how, heads=c.heads, split=True)


def a_mask_for_all_layers(c, batch, seq, d, how):
    spared = (c.layers - 1) * seq * seq if how == "none" else 0
    return kept(c, batch, seq, d, how) - spared


def a_mask_for_each_sequence(c, batch, seq, d, how):
    return kept(c, batch, seq, d, how, mask=batch)


def always_four_bytes(c, batch, seq, d, how):
    return kept(c, batch, seq, 4, how)


OUT, RUNS, LEARNS, NEEDS_NONE, DECODER, DICE, STREAM, *LAST = (c.name for c in check.recompute.criteria)
KEEPS, TWICE = LAST
INPUT, LINEAR, SELECTIVE, SQUARES, PARITY = (c.name for c in check.kept_bytes.criteria)
RECOMPUTE = {returns_nothing: OUT, runs_without_a_function: OUT, runs_again_without_grad: RUNS,
             returns_too_few: RUNS, forgets_the_inputs_gradient: LEARNS,
             takes_x_out_and_asks_no_gradient: LEARNS,
             forgets_what_came_from_above: LEARNS, forgets_the_parameters: LEARNS, goes_back_twice: LEARNS,
             asks_whether_the_input_learns: NEEDS_NONE, keeps_the_last_input_for_all: DECODER,
             rolls_new_dice: DICE, leaves_the_dice_as_they_fell: STREAM, keeps_everything: KEEPS,
             keeps_the_graph_of_the_first_run: KEEPS, keeps_the_output_too: KEEPS,
             hides_the_input_on_ctx: KEEPS, runs_three_times: TWICE}
KEPT = {"counts one layer": (per_layer, INPUT), "counts numbers": (counts_numbers, INPUT),
        "keeps the output of a layer too": (slip(full=2), INPUT),
        "keeps squares when selective": (slip(selective=True), LINEAR),
        "has no statistics": (slip(statistics=0), SELECTIVE), "has one norm": (slip(norms=1), SELECTIVE),
        "keeps q, k, v no more": (slip(qkv=0), SELECTIVE),
        "keeps one of two in the MLP": (slip(hidden=1), SELECTIVE),
        "counts an input for each of q, k, v": (slip(inputs=4), SELECTIVE),
        "has as many KV heads as heads": (full_grouped, SELECTIVE),
        "has heads as wide as the model, and KV = H": (as_wide_as_the_model, SELECTIVE),
        "has K = C / H": (slip(split=True), SELECTIVE), "has no mask": (slip(mask=0), SQUARES),
        "has a mask for all layers": (a_mask_for_all_layers, SQUARES),
        "keeps scores and softmax": (slip(squares=2), SQUARES),
        "has a mask of numbers": (slip(mask=4), SQUARES),
        "has a mask for each sequence": (a_mask_for_each_sequence, SQUARES),
        "has four bytes a number": (always_four_bytes, PARITY)}
MUTANTS = [Mutant(variant.__name__.replace("_", " "), check.recompute, variant, rejected_by)
           for variant, rejected_by in RECOMPUTE.items()]
MUTANTS += [Mutant(name, check.kept_bytes, *slipped) for name, slipped in KEPT.items()]
