"""Test cases of lesson 08: shapes, one rank's training, and the results of usual mistakes."""
import functools
from math import ceil, prod

import torch
from torch import nn

SHAPES = {"embed": (7, 3), "wide": (10, 4), "norm": (5,), "small": (2, 3)}     # rows that leave a remainder
STEPS, MICRO_BATCHES, RATE = 2, 2, 0.1
SGD = functools.partial(torch.optim.SGD, lr=RATE, momentum=0.9)
ADAM = functools.partial(torch.optim.Adam, lr=RATE)
STILL = "it has not moved: is the result written back into `params`, in place?"
AVERAGED = "averaged? The loss is divided by the global count already"
OLD = "the weights of the step before: gather for every use"


def padded(shape: tuple[int, ...], n: int) -> int:
    """Elements of a parameter of `shape`, with the zero rows that make `n` equal shares of it."""
    return n * ceil(shape[0] / n) * prod(shape[1:])


def state_limit(n: int) -> int:
    """Bytes of a rank's rows, their gradient and Adam's two moments, and of Adam's counters, in float64."""
    return 4 * 8 * sum(padded(shape, n) for shape in SHAPES.values()) // n + 16 * len(SHAPES)


def cut(x: torch.Tensor, n: int) -> torch.Tensor:
    """x (d0, ...) as (n, c, ...): c = ceil(d0 / n) rows a rank, and zeros after the last."""
    c = ceil(len(x) / n)
    rows = x.new_zeros(n * c, *x.shape[1:])
    rows[:len(x)] = x
    return rows.view(n, c, *x.shape[1:])


def model() -> nn.Sequential:
    """What zero3 is judged on: two modules of two matrices and two biases, float64, alike on every rank."""
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
                           for _ in range(2))).double()


def batch(step: int, rank: int, micro: int) -> torch.Tensor:
    """A micro-batch (2, 5)."""
    return drawn((2, 5), 1000 + 100 * step + 10 * rank + micro)


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Normal numbers in float64, the same for everyone who asks."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights() -> dict[str, torch.Tensor]:
    """The parameters that zero1_step is to move, by name."""
    return {name: drawn(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(step: int, rank: int) -> dict[str, torch.Tensor]:
    """What `rank` has of each parameter's gradient."""
    return {name: drawn(shape, 100 * step + 10 * rank + i + 50)
            for i, (name, shape) in enumerate(SHAPES.items())}


@functools.cache
def moved(n: int, momentum: float = 0.9, scale: float = 1.0, only: int | None = None) -> list[dict]:
    """[{name: weights}] before the first step and after each, of one rank that has all `n` gradients."""
    params = weights()
    optimizer, found = torch.optim.SGD(params.values(), RATE, momentum), [weights()]
    for step in range(STEPS):
        each = [gradients(step, rank) for rank in (range(n) if only is None else [only])]
        for name, p in params.items():
            p.grad = scale * sum(grads[name] for grads in each)
        optimizer.step()
        found.append({name: p.clone() for name, p in params.items()})
    return found


@functools.cache
def step_slips(n: int) -> dict[str, dict[str, torch.Tensor]]:
    """{cause: {name: weights}} that all ranks would have in the end."""
    start, end = moved(n)[0], moved(n)[-1]
    floor = {name: torch.cat([end[name][:len(p) // n * n], p[len(p) // n * n:]]) for name, p in start.items()}
    return {STILL: start, AVERAGED: moved(n, scale=1 / n)[-1],
            "one rank's gradient alone? Sum over the axis": moved(n, only=0)[-1],
            "momentum lost: does the optimizer live on in `state`?": moved(n, momentum=0.0)[-1],
            "the last rows stand still: ceil(d0 / N) rows a rank, not floor": floor}


def own_rows_moved(got: torch.Tensor, name: str, rank: int, n: int) -> torch.Tensor:
    """The first weights, with `got` in this rank's own rows."""
    mixed, c = moved(n)[0][name].clone(), ceil(len(got) / n)
    mixed[rank * c:(rank + 1) * c] = got[rank * c:(rank + 1) * c]
    return mixed


@functools.cache
def alone(n: int, frozen: bool = False, scale: float = 1.0, weights: tuple[int, int] = (1, 1)) -> tuple:
    """(outputs [step][rank] of the first micro-batch, [{name: gradient}]) of one rank with all batches."""
    net, outputs, grads = model(), [], []
    for step in range(STEPS):
        outputs.append([net(batch(step, rank, 0)).detach() for rank in range(n)])
        net.zero_grad()
        for micro in range(MICRO_BATCHES):
            for rank in range(n):
                (net(batch(step, rank, micro)).square().sum() * scale * weights[micro]).backward()
        grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
        for p in () if frozen else net.parameters():
            p.data -= RATE * p.grad
    return outputs, grads


@functools.cache
def train_slips(n: int) -> dict[str, list[dict[str, torch.Tensor]]]:
    """{cause: [{name: gradient}] a step}."""
    return {"the last micro-batch alone: add to `grads`": alone(n, weights=(0, 1))[1],
            "the first micro-batch was summed twice: p.grad = None when its rows have left":
                alone(n, weights=(2, 1))[1],
            AVERAGED: alone(n, scale=1 / n)[1], OLD: alone(n, frozen=True)[1]}
