"""Checks of lesson 01: Adam with float32 master weights on 16-bit parameters, and loss scaling."""
import math
from collections.abc import Callable

import torch

from lessons.l01_memory import cases
from lessons.l01_memory.cases import BETAS, EPS, SHAPES
from nanoinfra.config import ModelConfig
from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.compare_tensors import assert_same_tensor
from nanoinfra.lab.instruments.live_tensor_bytes import LiveTensorBytes
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.initialization import init_weights
from nanoinfra.train.loss import linear_cross_entropy
from nanoinfra.train.loss_scale import LossScale

PREDICTIONS = {"L01.states": "B", "L01.layer_float32": "B", "L01.layer_bfloat16": "B",
               "L01.skipped": "steps"}
CONFIG = ModelConfig(vocab=61, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, hidden=40, context=16)
SCALE = 2.0**16
TINY = 2.0**-26                              # of this gradient float16 keeps nothing; SCALE lifts it

adam_step = Check("adam_step")
scaled_step = Check("scaled_step")
CHECKS = (adam_step, scaled_step)


@adam_step.criterion("moves the weights in place", "property")
def _(subject):
    for dtype in (torch.bfloat16, torch.float16):
        params = cases.parameters(dtype, torch.zeros)
        places = {name: p.data_ptr() for name, p in params.items()}
        cases.run(subject, params, [cases.filled(0.25)], lr=0.5)
        for i, (name, p) in enumerate(params.items()):
            if p.data_ptr() != places[name]:
                raise CriterionNotMet(f"`{name}` lies elsewhere in memory after a step, in {p.dtype}: the "
                                      "model keeps its 16-bit tensors, p.copy_(...) rounds into them")
            causes = {"no bias correction? At first, m and v are far too small": math.inf,
                      "`t` counts steps, not parameters": i + 1}
            slips = {text: torch.full_like(p, cases.walk(0.25, 1, 0.5, lambda t, power=power: power))
                     for text, power in causes.items()} | {"not moved: is p written to?": torch.zeros_like(p)}
            assert_same_tensor(name, p.data, torch.full_like(p, -0.5), 0, 1, 0.01, slips)


@adam_step.criterion("updates too small for 16 bits add up", "property")
def _(subject):
    for dtype in (torch.bfloat16, torch.float16):
        params = cases.parameters(dtype, torch.ones)
        cases.run(subject, params, [cases.filled(0.25)] * 64, lr=2.0**-12)     # 2^-6 in all, 2^-12 is lost
        for name, p in params.items():
            far = 1 + cases.walk(0.25, 64, 2.0**-12, lambda t: 1)
            slips = {"the weights stand still: is each update rounded away, for want of a float32 master "
                     "that is kept from step to step?": torch.ones_like(p),
                     "1 - beta, where 1 - beta^t corrects?": torch.full_like(p, far)}
            assert_same_tensor(f"{name}, after 64 steps of 2^-12 from 1", p.data,
                               torch.full_like(p, 1 - 2.0**-6), 0, 1, 2.0**-8, slips)


@adam_step.criterion("small gradients keep their squares", "property")
def _(subject):
    params = cases.parameters(torch.float16, torch.zeros)
    cases.run(subject, params, [cases.filled(2.0**-13)] * 3, lr=0.125)         # 2^-26 is 0 in float16
    end = cases.walk(2.0**-13, 3, 0.125, inside=EPS)
    for name, p in params.items():
        far = p.data if (p < -100).all() else torch.zeros_like(p)
        causes = {"divided by eps alone: are moments in 16 bits, or g * g?": far,
                  "eps stands beside the root, not in it": torch.full_like(p, end)}
        assert_same_tensor(f"{name}, three steps on gradients of 2^-13, whose squares are 0 in float16",
                           p.data, torch.full_like(p, -0.375), 0, 1, 0.01, causes)


@adam_step.criterion("torch's Adam on float32 masters", "parity")
def _(subject):
    for dtype in (torch.bfloat16, torch.float16):
        params = cases.parameters(dtype, cases.drawn(0))
        grads = [{name: cases.drawn(step)(shape) for name, shape in SHAPES.items()} for step in range(1, 11)]
        factors = [2.0 ** -(step % 4) for step in range(10)]
        want, plain, state = cases.adam(params, grads, factors), cases.adam(params, grads, [1.0] * 10), {}
        cases.run(subject, params, grads, 0.01, factors, state)
        for name, p in params.items():
            causes = {"the gradient is factor x p.grad": plain[name]}
            if cases.narrow(state):
                causes["`state` holds 16-bit tensors: moments in 16 bits?"] = p.data
            assert_same_tensor(f"{name}, ten steps in {dtype}", p.data, want[name], 0, 1,
                               torch.finfo(dtype).eps, causes)


@adam_step.criterion("factor x gradient in float32", "parity")
def _(subject):
    params, factors = cases.parameters(torch.float16, torch.zeros), [2.0**-16] * 3
    grads = [cases.filled(g * 2.0**-10) for g in (1, 0.75, 1.25)]
    want = cases.adam(params, grads, factors)
    cases.run(subject, params, grads, 0.01, factors)
    for name, p in params.items():
        causes = {"factor x p.grad multiplied in 16 bits? Make p.grad float32 first": torch.zeros_like(p)}
        assert_same_tensor(f"{name}, three steps in float16, gradients near 2^-10, factor 2^-16", p.data,
                           want[name], 0, 1, 0.01, causes)


@adam_step.criterion("other betas, another eps", "parity")
def _(subject):
    betas, eps = (0.8, 0.99), 2.0**-6
    params = cases.parameters(torch.float16, cases.drawn(0))
    grads = [{name: cases.drawn(step)(shape) for name, shape in SHAPES.items()} for step in range(1, 6)]
    slips = {"are 0.9 and 0.95 written in? Use `betas`": cases.adam(params, grads, betas=BETAS, eps=eps),
             "is 1e-8 written in? Use `eps`": cases.adam(params, grads, betas=betas),
             "are betas and eps written in?": cases.adam(params, grads)}
    want = cases.adam(params, grads, betas=betas, eps=eps)
    cases.run(subject, params, grads, 0.01, betas=betas, eps=eps)
    for name, p in params.items():
        assert_same_tensor(f"{name}, five steps with betas={betas} and eps=2^-6", p.data, want[name], 0, 1,
                           2.0**-10, {text: ends[name] for text, ends in slips.items()})


@adam_step.criterion("12 bytes a parameter besides weights and gradients", "resource")
def _(subject):
    params, state = cases.parameters(torch.bfloat16, cases.drawn(0)), {}
    psi = sum(p.numel() for p in params.values())
    with LiveTensorBytes() as storages:
        for step in range(3):
            cases.run(subject, params, [cases.filled(step)], 0.01, state=state)
        extra = storages.live_bytes()
    if not 12 * psi <= extra <= 12 * psi + 64 * len(params):               # and a step counter a tensor
        why = next((text for text, times in _KEPT.items() if round(extra / psi) == times), "")
        raise CriterionNotMet(f"keeps {extra:,} bytes between steps for {psi:,} parameters, "
                              f"{extra / psi:.4g} each; want 12: master, first and second moment in "
                              f"float32{why}")


_KEPT = {"; moments in 16 bits?": 8, "; all three in 16 bits?": 6, "; in float64?": 24, "; no masters?": 8,
         "; a fourth float32 tensor, of gradients or weights?": 16, "; nothing kept in `state`?": 0}


@scaled_step.criterion("true gradients, of the smallest too", "property")
def _(subject):
    for value in (SCALE, 2 * SCALE):
        slopes = {"first": TINY, "middle": -0.25, "last": 2.0**-14}
        trial, norm = _Trial(slopes), _norm(slopes)
        _moved(trial.step(subject, _scale(value), 1e9), f"a scale of {value:g}", "; is the norm itself "
               "infinite in 16 bits? Take it with dtype=torch.float32")
        if not trial.factors:
            raise CriterionNotMet("returns True, and did not call move(factor)")
        if abs(trial.factors[0] * value * norm / 1e9 - 1) < 1e-3:
            raise CriterionNotMet(f"gradients of norm {norm:.4g}, limit 1e9: factor x scale is "
                                  f"{1e9 / norm:.4g}, want 1: clipping only ever shrinks")
        for name, slope in slopes.items():
            got, want = trial.true[name], torch.full(SHAPES[name], slope)
            causes = {"the scale is still in it: undone by `factor`?": want * value,
                      "lost in float16: is the loss scaled before backward, and nothing divided after it but "
                      "by `factor`?": want * 0, "divided twice?": want / value}
            assert_same_tensor(f"factor x {name}.grad", got, want, 0, 1, 1e-6, causes)


@scaled_step.criterion("clips by the norm without the scale", "property")
def _(subject):
    norm = _norm(dict.fromkeys(SHAPES, 0.25))
    for limit, clipped in ((2 * norm, 1.0), (norm / 2, 0.5)):
        trial = _Trial(dict.fromkeys(SHAPES, 0.25))
        _moved(trial.step(subject, _scale(SCALE), limit), f"gradients of norm {norm:.4g}")
        got, want = trial.factors[0] * SCALE, clipped
        if abs(got / want - 1) > 1e-3:
            raise CriterionNotMet(f"gradients of norm {norm:.4g}, limit {limit:.4g}: factor x scale is "
                                  f"{got:.4g}, want {want:.4g}: {_clip_cause(got, want, limit / norm)}")


@scaled_step.criterion("moves on gradients of 0", "property")
def _(subject):
    trial = _Trial(dict.fromkeys(SHAPES, 0.0))
    text = f"all gradients are 0: the factor is 1/scale, {1 / SCALE:g}"
    try:
        moved = trial.step(subject, _scale(SCALE), limit=1.0)
    except ZeroDivisionError as error:
        raise CriterionNotMet(f"{text}; got a ZeroDivisionError: {error}") from None
    _moved(moved, text)
    if trial.factors != [1 / SCALE]:
        raise CriterionNotMet(f"{text}; got {trial.factors[0]:g}")


@scaled_step.criterion("skips a step that is not finite", "property")
def _(subject):
    for name in SHAPES:
        for bad in (math.inf, -math.inf, math.nan):
            trial = _Trial(dict.fromkeys(SHAPES, 0.25) | {name: bad})
            moved = trial.step(subject, _scale(SCALE), limit=1.0)
            if trial.factors:
                raise CriterionNotMet(f"{name}.grad is {bad}, and move({trial.factors[0]:.4g}) was called: "
                                      f"{bad} times anything, 0 too, spoils masters and moments for ever")
            if moved is not False:
                raise CriterionNotMet(f"a skipped step returns {moved!r}, want False")


@scaled_step.criterion("an overflow leaves nothing behind", "property")
def _(subject):
    trial, scale = _Trial(dict.fromkeys(SHAPES, 0.25)), _scale(SCALE)
    for slope in (math.inf, 0.25, 0.25):
        trial.slopes = dict.fromkeys(SHAPES, slope)
        moved = trial.step(subject, scale, limit=1e9)
    text = "an overflow, then two good steps: are gradients of earlier steps still in p.grad?"
    _moved(moved, text)
    for name in SHAPES:
        assert_same_tensor(f"factor x {name}.grad, {text}", trial.true[name], torch.full(SHAPES[name], 0.25),
                           0, 1, 1e-3)


@scaled_step.criterion("halves, and doubles again", "parity")
def _(subject):
    random = torch.Generator().manual_seed(2)
    overflows = (torch.rand(40, generator=random) < 0.2).tolist()
    trial, scale, want = _Trial({}), _scale(1024.0), LossScale(1024.0, growth_interval=3)
    for step, overflow in enumerate(overflows):
        trial.slopes = dict.fromkeys(SHAPES, math.inf if overflow else 2.0**-20)
        before = scale["value"]
        trial.step(subject, scale, limit=1.0)
        want.update(overflow)
        if scale["value"] != want.value:
            past = "".join("x" if o else "." for o in overflows[:step + 1])
            raise CriterionNotMet(f"steps so far, x an overflow: {past}; grow_after 3: scale {before:g} "
                                  f"becomes {scale['value']:g}, want {want.value:g}: "
                                  f"{_scale_cause(overflow, scale, want)}")


@scaled_step.criterion("a float16 decoder has float32's gradients", "parity")
def _(subject):
    tokens = torch.randint(CONFIG.vocab, (2, 16), generator=torch.Generator().manual_seed(1))
    model, want = init_weights(Decoder(CONFIG), seed=3).half(), init_weights(Decoder(CONFIG), seed=3)
    _loss(want, tokens).backward()
    params, got = dict(model.named_parameters()), {}

    def move(factor):
        got.update({name: p.grad.float() * factor for name, p in params.items()})
    _moved(subject(_loss(model, tokens), params, _scale(SCALE), 1e9, move), "a decoder in float16")
    for name, p in want.named_parameters():
        assert_same_tensor(f"{name}.grad", got[name], p.grad, 0, 1, 0.02)


@scaled_step.criterion("holds gradients once, in 16 bits", "resource")
def _(subject):
    trial = _Trial(dict.fromkeys(SHAPES, 0.25))
    with LiveTensorBytes() as storages:
        trial.step(subject, _scale(SCALE), 1.0, storages.live_bytes)
    psi = sum(p.numel() for p in trial.params.values())
    if trial.held > 2 * psi + 1024:
        raise CriterionNotMet(f"at move(), {trial.held:,} bytes of gradients are held for {psi:,} "
                              f"parameters, want {2 * psi:,}: a second copy? A norm needs none, and move "
                              "takes a factor")


class _Trial:
    """float16 parameters whose gradients are given numbers, and what `move` was called with."""

    def __init__(self, slopes: dict[str, float]):
        self.slopes, self.params = slopes, cases.parameters(torch.float16, torch.ones)
        self.factors, self.true, self.held = [], {}, 0

    def step(self, subject: Callable, scale: dict, limit: float, held: Callable = int):
        """One call of the subject; what it returns."""
        loss = sum((p.float() * self.slopes[name]).sum() for name, p in self.params.items())

        def move(factor):
            self.held = held()
            self.factors.append(float(factor))
            self.true = {name: p.grad.float() * float(factor) for name, p in self.params.items()}
        return subject(loss, self.params, scale, limit, move)


def _scale(value):
    return {"value": value, "good": 0, "grow_after": 3}


def _loss(model, tokens):
    """As one micro-batch of a step of a million tokens."""
    return linear_cross_entropy(model.hidden_states(tokens), model.head.weight, tokens, 2**20)


def _moved(moved, what, why=""):
    if moved is not True:
        raise CriterionNotMet(f"{what}: returns {moved!r}, want True: all gradients are finite, so it "
                              f"moves{why}")


def _norm(slopes):
    return math.sqrt(sum(math.prod(SHAPES[name]) * slope**2 for name, slope in slopes.items()))


def _clip_cause(got, want, ratio):
    if got < want / 10:
        return "the norm of the scaled gradients was clipped: undo the scale first"
    if abs(got - ratio) < 1e-3:
        return "clipping only ever shrinks"
    return "never clipped?" if got == 1 else "the norm over all tensors together?"


def _scale_cause(overflow, scale, want):
    if overflow:
        return "half after an overflow"
    if scale["value"] < want.value:
        return "doubled after grow_after good steps in a row, and then counted from 0?"
    return "doubled too early: does an overflow set `good` back to 0?"
