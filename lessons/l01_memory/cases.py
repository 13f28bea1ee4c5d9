"""Test cases of lesson 01: 16-bit parameters and gradients, torch's Adam, and results of usual mistakes."""
import math

import torch
from torch.utils._pytree import tree_leaves

BETAS, EPS = (0.9, 0.95), 1e-8
SHAPES = {"first": (3,), "middle": (2, 5), "last": (40, 30)}


def parameters(dtype, fill):
    """{name: p} of SHAPES, each filled by `fill(shape)`."""
    return {name: fill(shape).to(dtype).requires_grad_() for name, shape in SHAPES.items()}


def drawn(seed):
    """A function that makes a tensor of a shape, normal numbers of 0.02."""
    random = torch.Generator().manual_seed(seed)
    return lambda shape: 0.02 * torch.randn(tuple(shape), generator=random)


def filled(value):
    """{name: tensor} of SHAPES, all numbers `value`."""
    return {name: torch.full(shape, float(value)) for name, shape in SHAPES.items()}


def run(subject, params, grads, lr, factors=None, state=None, **constants):
    """`subject` once for each of `grads`, {name: gradient}."""
    state = {} if state is None else state
    for step, factor in zip(grads, factors or [1.0] * len(grads)):
        for name, p in params.items():
            p.grad = step[name].to(p.dtype)
        subject(params, state, lr, factor, **constants)
    for p in params.values():
        p.grad = None


def adam(params, grads, factors=None, betas=BETAS, eps=EPS):
    """Where torch's Adam ends from `params`, on float32 masters and factor x 16-bit gradients."""
    masters = {name: p.detach().float().requires_grad_() for name, p in params.items()}
    oracle = torch.optim.Adam(masters.values(), lr=0.01, betas=betas, eps=eps)
    for step, factor in zip(grads, factors or [1.0] * len(grads)):
        for name, master in masters.items():
            master.grad = step[name].to(params[name].dtype).float() * factor
        oracle.step()
    return {name: master.detach().to(params[name].dtype) for name, master in masters.items()}


def walk(g, steps, lr, power=lambda t: t, inside=0.0):
    """Where Adam goes from 0 on a constant gradient, corrected by 1 - beta^power(t); `inside` the root."""
    at = 0.0
    for t in range(1, steps + 1):
        m, v = (x * (1 - beta**t) / (1 - beta ** power(t)) for x, beta in zip((g, g * g), BETAS))
        at -= lr * m / (math.sqrt(v + inside) + EPS - inside)
    return at


def narrow(state):
    """Whether `state` holds 16-bit tensors."""
    return any(x.dtype.itemsize == 2 for x in tree_leaves(state) if isinstance(x, torch.Tensor))
