"""Recompute instead of remember: keep what goes into a function, and in backward run it again.

    "full"       a block keeps its input, B T C numbers, and runs twice        FLOPs x 4/3, the head apart
    "selective"  the core of naive attention keeps q, k, v and no (T, T) square        + 4 B H K T^2 a layer
The exact bytes and FLOPs are in formulas/. Chen et al. 2016; selective: Korthikanti et al. 2022.
Composes with anything that waits for gradients: a parameter's hooks see its gradient when it arrives, and
hooks of a block fire in the first forward alone.
"""
import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

HOW = ("none", "selective", "full")


def apply(model: nn.Module, how: str) -> nn.Module:
    """Make every block of `model.blocks` recompute, `how` of HOW, and return the model.

    "full" asks of a block nothing but tensors out; "selective" looks for the attention's function in
    `block.attn.core`. ValueError where that is not the naive one: no other keeps scores to be saved.
    """
    if how not in HOW:
        raise ValueError(f"recompute is one of {', '.join(HOW)}, not {how!r}")
    for block in model.blocks if how != "none" else ():
        if how == "full":
            block.forward = functools.partial(recompute, block.forward)       # hooks stay outside of it
        else:
            block.attn.core = functools.partial(recompute, _naive(block.attn.core))
    return model


def recompute(fn: Callable, *args):
    """`fn(*args)`, a tensor or a tuple of them, with the same gradients, keeping nothing but `args`.

    Tensors may lie in tuples, lists and dicts inside `args`; anything else passes. `fn` runs a second time
    in backward, from the same random state and under the same autocast; Python's own `random` is not set
    back. Parameters that `fn` uses get their gradients by `.backward()`, not by `torch.autograd.grad`. A call
    also keeps torch's random state: 5 KB on the CPU, 16 bytes on a GPU.
    """
    if not torch.is_grad_enabled():
        return fn(*args)
    tensors = []
    places = _take_out(args, tensors)
    return _Recompute.apply(fn, places, torch.empty(0, requires_grad=True), *tensors)


class _Recompute(torch.autograd.Function):
    """`anchor` requires grad: so backward comes, for fn's parameters, even if no input needs a gradient."""

    @staticmethod
    def forward(ctx, fn, places, anchor, *tensors):                           # runs without grad
        ctx.fn, ctx.places, ctx.then = fn, places, _Surroundings(tensors)
        ctx.save_for_backward(*tensors)
        with ctx.then.autocast():
            return fn(*_put_back(places, tensors))

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():                                           # create_graph=True
            raise ValueError("a recomputed function gives gradients once, not gradients of gradients; "
                             "leave create_graph, or --recompute, out")
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad(), ctx.then.random(), ctx.then.autocast():
            out = ctx.fn(*_put_back(ctx.places, inputs))
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [(o, grad) for o, grad in zip(outs, upstream) if o.requires_grad]
        if pairs:                                                             # none if all of fn is frozen
            torch.autograd.backward(*zip(*pairs))
        return None, None, None, *(t.grad for t in inputs)


class _Surroundings:
    """What the second run must find as the first one did: random states, and autocast."""

    def __init__(self, tensors):
        self.devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]
        kind = "cuda" if self.devices else "cpu"
        self.casts = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    @contextlib.contextmanager
    def random(self):
        with torch.random.fork_rng(self.devices):                             # the caller's come back after
            torch.set_rng_state(self.states[0])
            for state, device in zip(self.states[1:], self.devices):
                torch.cuda.set_rng_state(state, device)
            yield

    def autocast(self):
        return torch.autocast(*self.casts, cache_enabled=False)               # a cast without grad is no use


class _Place(int):
    """Where a tensor went: its index in the list."""


def _take_out(tree, tensors):
    """`tree`, where each tensor in its tuples, lists and dicts has moved to `tensors` and left its place."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return _Place(len(tensors) - 1)
    return _map(lambda part: _take_out(part, tensors), tree)


def _put_back(tree, tensors):
    if isinstance(tree, _Place):
        return tensors[tree]
    return _map(lambda part: _put_back(part, tensors), tree)


def _map(change, tree):
    if type(tree) in (tuple, list):
        return type(tree)(map(change, tree))
    return {key: change(part) for key, part in tree.items()} if type(tree) is dict else tree


def _naive(core):
    name = getattr(core, "__name__", type(core).__name__).removesuffix("_attention")
    if name != "naive":
        raise ValueError(f"selective recompute saves the scores of naive attention, and {name} keeps none, "
                         f"so there is nothing to save; try --attention naive, or --recompute full")
    return core
