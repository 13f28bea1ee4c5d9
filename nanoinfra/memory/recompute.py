"""Activation checkpointing (recompute): save only a function's inputs, and run it again in backward.

    "full"       a block saves its input, B T C numbers, and runs twice        FLOPs x 4/3, the head apart
    "selective"  the core of naive attention saves q, k, v and no (T, T) scores        + 4 B H K T^2 a layer
The exact bytes and FLOPs are in formulas/. Chen et al. 2016; selective: Korthikanti et al. 2022.
Composes with anything that hooks gradients: a parameter's hooks run when its gradient is there, and hooks of
a block run in the first forward only.
"""
import contextlib
import functools
from collections.abc import Callable

import torch
from torch import nn

RECOMPUTE_MODES = ("none", "selective", "full")


def apply_activation_checkpointing(model: nn.Module, mode: str) -> nn.Module:
    """Make every block of `model.blocks` recompute in backward, and return the model.

    `mode` is one of RECOMPUTE_MODES. "full" needs blocks that return tensors; "selective" wraps the attention
    function `block.attn.core`. Raises ValueError where that is not the naive one, because no other saves
    attention scores.
    """
    if mode not in RECOMPUTE_MODES:
        raise ValueError(f"recompute is one of {', '.join(RECOMPUTE_MODES)}, not {mode!r}")
    for block in model.blocks if mode != "none" else ():
        if mode == "full":
            block.forward = functools.partial(activation_checkpoint, block.forward)   # its hooks stay outside
        else:
            block.attn.core = functools.partial(activation_checkpoint, _naive(block.attn.core))
    return model


def activation_checkpoint(fn: Callable, *args) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Call `fn(*args)` and save only `args` for backward, which runs `fn` again; the gradients are the same.

    `fn` returns a tensor or a tuple of tensors. Tensors may be in tuples, NamedTuples, lists and dicts inside
    `args`; other values are passed through. The second run has the same torch random state and autocast;
    Python's own `random` is not restored. Parameters that `fn` uses get their gradients by `.backward()`, not
    by `torch.autograd.grad`. A call also saves torch's random state: 5 KB on the CPU, 16 bytes on a GPU.
    """
    if not torch.is_grad_enabled():
        return fn(*args)
    tensors = []
    places = _take_out(args, tensors)
    return _Recompute.apply(fn, places, torch.empty(0, requires_grad=True), *tensors)


class _Recompute(torch.autograd.Function):
    """`anchor` requires grad, so backward runs, for fn's parameters, even if no input needs a gradient."""

    @staticmethod
    def forward(ctx, fn, places, anchor, *tensors):                           # runs without grad
        ctx.fn, ctx.places, ctx.run_state = fn, places, _RunState(tensors)
        ctx.save_for_backward(*tensors)
        with ctx.run_state.autocast():
            return fn(*_put_back(places, tensors))

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():                                           # create_graph=True
            raise ValueError("a recomputed function gives gradients once, not gradients of gradients; "
                             "leave create_graph, or --recompute, out")
        needed = ctx.needs_input_grad[3:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad(), ctx.run_state.random(), ctx.run_state.autocast():
            out = ctx.fn(*_put_back(ctx.places, inputs))
        outs = out if isinstance(out, tuple) else (out,)
        pairs = [(o, grad) for o, grad in zip(outs, upstream) if o.requires_grad]
        if pairs:                                                             # none if all of fn is frozen
            torch.autograd.backward(*zip(*pairs))
        return None, None, None, *(t.grad for t in inputs)


class _RunState:
    """The random states and the autocast setting of the first run, for the second one."""

    def __init__(self, tensors):
        self.devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        self.states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.devices)]
        kind = "cuda" if self.devices else "cpu"
        self.casts = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    @contextlib.contextmanager
    def random(self):
        with torch.random.fork_rng(self.devices):                         # restores the caller's states after
            torch.set_rng_state(self.states[0])
            for state, device in zip(self.states[1:], self.devices):
                torch.cuda.set_rng_state(state, device)
            yield

    def autocast(self):
        return torch.autocast(*self.casts, cache_enabled=False)       # casts made without grad are not reused


class _Place(int):
    """Stands in for a tensor: its index in the list of tensors."""


def _take_out(tree, tensors):
    """`tree` with each tensor in its tuples, lists and dicts moved to `tensors` and replaced by a _Place."""
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
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):             # a NamedTuple
        return type(tree)(*map(change, tree))
    return {key: change(part) for key, part in tree.items()} if type(tree) is dict else tree


def _naive(core):
    name = getattr(core, "__name__", type(core).__name__)
    if name != "naive_attention":
        name = name.removesuffix("_attention").removesuffix("Core").lower()
        raise ValueError(f"selective recompute saves the scores of naive attention, and {name} keeps none, "
                         f"so there is nothing to save; try --attention naive, or --recompute full")
    return core
