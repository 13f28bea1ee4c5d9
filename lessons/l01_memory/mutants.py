"""Known-wrong mixed precision: each has one mistake that a check must find."""
import math

import torch

from lessons.l01_memory import checks as check
from nanoinfra.lab.mutants import Mutant


@torch.no_grad()
def adam(params, state, lr, factor=1.0, betas=(0.9, 0.95), eps=1e-8, kept=torch.float32,
         moments=torch.float32, anew=False, corrected=True, square=lambda g: g * g, in_place=True,
         extra=None, product=lambda g, factor: g.float() * factor, power=lambda t, i, n: t, inside=False):
    """The right one, with a place for each slip."""
    step = state["t"] = state.get("t", 0) + 1
    for i, (name, p) in enumerate(params.items()):
        t = power(step, i, len(params))
        if step == 1:
            zeros = torch.zeros_like(p, dtype=moments)
            state[name] = [p.to(kept).clone(), zeros, zeros.clone()]
        master, m, v = state[name][:3]
        master = p.float() if anew else master
        g = product(p.grad, factor)
        m.lerp_(g.to(moments), 1 - betas[0])
        v.lerp_(square(g).to(moments), 1 - betas[1])
        c1, c2 = ((1 - beta**t) if corrected else 1 for beta in betas)
        root = (v.float() / c2 + eps).sqrt() if inside else (v.float() / c2).sqrt() + eps
        master -= (lr * (m.float() / c1) / root).to(master.dtype)
        if extra:
            state[name][3:] = [*state[name][3:], extra(p, g)][:1]
        if in_place:
            p.copy_(master)
        else:
            p.data = master.to(p.dtype)


def has_no_masters(params, *args, **more):
    adam(params, *args, kept=next(iter(params.values())).dtype, **more)


def makes_masters_anew(*args, **more):
    adam(*args, anew=True, **more)


def keeps_moments_in_16_bits(params, *args, **more):
    adam(params, *args, moments=next(iter(params.values())).dtype, **more)


def keeps_moments_in_bfloat16(*args, **more):
    adam(*args, moments=torch.bfloat16, **more)


def squares_in_16_bits(params, *args, **more):
    narrow = next(iter(params.values())).dtype
    adam(params, *args, square=lambda g: (g.to(narrow) * g.to(narrow)).float(), **more)


def multiplies_by_the_factor_in_16_bits(*args, **more):
    adam(*args, product=lambda g, factor: (factor * g).float(), **more)


def forgets_bias_correction(*args, **more):
    adam(*args, corrected=False, **more)


def corrects_by_one_minus_beta(*args, **more):
    adam(*args, power=lambda t, i, n: 1, **more)


def counts_parameters_as_steps(*args, **more):
    adam(*args, power=lambda t, i, n: n * (t - 1) + i + 1, **more)


def has_eps_inside_the_root(*args, **more):
    adam(*args, inside=True, **more)


def has_betas_of_its_own(params, state, lr, factor=1.0, betas=None, eps=1e-8):
    adam(params, state, lr, factor, eps=eps)


def has_an_eps_of_its_own(params, state, lr, factor=1.0, betas=(0.9, 0.95), eps=None):
    adam(params, state, lr, factor, betas)


def ignores_the_factor(params, state, lr, factor=1.0, **more):
    adam(params, state, lr, **more)


def multiplies_the_update_by_the_factor(params, state, lr, factor=1.0, **more):
    adam(params, state, lr * factor, **more)


def makes_new_weights(*args, **more):
    adam(*args, in_place=False, **more)


def keeps_float32_gradients(*args, **more):
    adam(*args, extra=lambda p, g: g, **more)


def keeps_the_initial_weights(*args, **more):
    adam(*args, extra=lambda p, g: p.float(), **more)


def keeps_float64(*args, **more):
    adam(*args, kept=torch.float64, moments=torch.float64, **more)


def scaled(loss, params, scale, limit, move, on_loss=True, undo=1, clip=True, alone=False, spoil=None,
           judge=math.isfinite, clear=True, grow=True, restart=True, halve=True, copies=False, divide=False,
           wide=torch.float32, shrink=lambda limit, norm: limit / max(norm, limit)):
    """The right one, with a place for each slip."""
    value = scale["value"]
    (loss * value if on_loss else loss).backward()
    if divide:
        for p in params.values():
            p.grad /= value
    grads = {name: p.grad.float() for name, p in params.items()} if copies else {}
    norms = [torch.linalg.vector_norm(p.grad, dtype=wide) for p in params.values()]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item() / (value**undo)
    moved = judge(norms[0].item() if alone else norm)
    if moved or spoil is not None:
        clipped = shrink(limit, norm) if clip else 1.0
        move(clipped / (1 if divide or not on_loss else value) if moved else spoil)
    if moved:
        scale["good"] += 1
        if grow and scale["good"] == scale["grow_after"]:
            scale["value"], scale["good"] = 2 * value, 0
    else:
        scale["value"], scale["good"] = (value / 2 if halve else value), (0 if restart else scale["good"])
    for p in params.values() if clear else ():
        p.grad = None
    grads.clear()
    return moved


def scales_nothing(*args):
    return scaled(*args, on_loss=False, undo=0)


def divides_in_float16(*args):
    return scaled(*args, divide=True, undo=0)


def never_undoes_the_scale(loss, params, scale, limit, move):
    return scaled(loss, params, scale, limit, lambda factor: move(factor * scale["value"]))


def clips_before_it_undoes_the_scale(*args):
    return scaled(*args, undo=0)


def never_clips(*args):
    return scaled(*args, clip=False)


def scales_up_to_the_limit(*args):
    return scaled(*args, shrink=lambda limit, norm: limit / norm if norm else 1.0)


def divides_by_a_norm_of_0(*args):
    return scaled(*args, shrink=lambda limit, norm: min(1.0, limit / norm))


def takes_the_norm_in_16_bits(*args):
    return scaled(*args, wide=torch.float16)


def skips_nothing(*args):
    return scaled(*args, judge=lambda norm: True)


def looks_at_the_first_tensor(*args):
    return scaled(*args, alone=True)


def looks_for_infinity_alone(*args):
    return scaled(*args, judge=lambda norm: norm != math.inf)


def moves_by_zero_times_infinity(*args):
    return scaled(*args, spoil=0.0)


def keeps_the_gradients(*args):
    return scaled(*args, clear=False)


def never_grows_back(*args):
    return scaled(*args, grow=False)


def never_halves(*args):
    return scaled(*args, halve=False)


def counts_good_steps_across_an_overflow(*args):
    return scaled(*args, restart=False)


def copies_gradients_to_float32(*args):
    return scaled(*args, copies=True)


PLACE, SMALL, SQUARES, TORCH, FACTOR, BETAS, BYTES = (c.name for c in check.adam_step.criteria)
TRUE, CLIPS, ZERO, SKIPS, BEHIND, DOUBLES, DECODER, ONCE = (c.name for c in check.scaled_step.criteria)
ADAM = {makes_new_weights: PLACE, forgets_bias_correction: PLACE, counts_parameters_as_steps: PLACE,
        has_no_masters: SMALL, makes_masters_anew: SMALL, corrects_by_one_minus_beta: SMALL,
        keeps_moments_in_16_bits: SQUARES, squares_in_16_bits: SQUARES, has_eps_inside_the_root: SQUARES,
        ignores_the_factor: TORCH, multiplies_the_update_by_the_factor: TORCH,
        keeps_moments_in_bfloat16: TORCH, multiplies_by_the_factor_in_16_bits: FACTOR,
        has_betas_of_its_own: BETAS, has_an_eps_of_its_own: BETAS, keeps_float32_gradients: BYTES,
        keeps_the_initial_weights: BYTES, keeps_float64: BYTES}
SCALED = {scales_nothing: TRUE, divides_in_float16: TRUE, never_undoes_the_scale: TRUE,
          scales_up_to_the_limit: TRUE, takes_the_norm_in_16_bits: TRUE,
          clips_before_it_undoes_the_scale: CLIPS, never_clips: CLIPS, divides_by_a_norm_of_0: ZERO,
          skips_nothing: SKIPS, looks_at_the_first_tensor: SKIPS, looks_for_infinity_alone: SKIPS,
          moves_by_zero_times_infinity: SKIPS, keeps_the_gradients: BEHIND, never_grows_back: DOUBLES,
          never_halves: DOUBLES, counts_good_steps_across_an_overflow: DOUBLES,
          copies_gradients_to_float32: ONCE}
MUTANTS = [Mutant(variant.__name__.replace("_", " "), judge, variant, rejected_by)
           for judge, variants in ((check.adam_step, ADAM), (check.scaled_step, SCALED))
           for variant, rejected_by in variants.items()]
