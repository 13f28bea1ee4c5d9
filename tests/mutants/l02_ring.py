"""Known-wrong rings. Each is one slip away from right."""
import torch

from nanoinfra.dist import comm
from nanoinfra.lab.checks.l02_ring import ring_all_reduce, ring_reduce_scatter
from nanoinfra.lab.mutants import Mutant


def reduce_scatter(parts, axis, steps=None, shift=1, add=torch.add, dtype=None):
    """The right one, with a place for each slip."""
    n, r = axis.size, axis.rank
    for step in range(n - 1 if steps is None else steps(n)):
        sent = (r - step) % n
        came = comm.exchange(parts[sent].to(dtype or parts.dtype), axis).to(parts.dtype)
        parts[(sent - shift) % n] = add(parts[(sent - shift) % n], came)
    return parts


def all_reduce(x, axis, **slip):
    """Reduce-scatter with a slip, then a right all-gather."""
    parts = reduce_scatter(x.view(axis.size, -1), axis, **slip)                        # (N, numel/N)
    return all_gather(parts, axis).view(-1)


def all_gather(parts, axis, steps=None):
    n, r = axis.size, axis.rank
    for step in range(n - 1 if steps is None else steps(n)):
        sent = (r + 1 - step) % n
        parts[sent - 1] = comm.exchange(parts[sent], axis)
    return parts


def one_step_short(parts, axis):
    return reduce_scatter(parts, axis, steps=lambda n: n - 2)


def overwrites(parts, axis):
    return reduce_scatter(parts, axis, add=lambda mine, came: came)


def adds_to_the_chunk_it_sent(parts, axis):
    return reduce_scatter(parts, axis, shift=0)


def sends_everything_each_step(parts, axis):
    n, r = axis.size, axis.rank
    for step in range(n - 1):
        sent = (r - step) % n
        parts[sent - 1] += comm.exchange(parts, axis)[sent - 1] if n == 1 else comm.exchange(parts, axis)[sent]
    return parts


def asks_the_library(parts, axis):
    parts[(axis.rank + 1) % axis.size] = comm.reduce_scatter(parts.roll(-1, 0), axis)
    return parts


def no_sends(x, axis):
    return x


def averages(x, axis):
    return all_reduce(x, axis).div_(axis.size)


def keeps_its_parts(x, axis):
    return reduce_scatter(x.view(axis.size, -1), axis).view(-1)


def forgets_the_last_hop(x, axis):
    parts = reduce_scatter(x.view(axis.size, -1), axis)
    return all_gather(parts, axis, steps=lambda n: n - 2).view(-1)


def sends_float32(x, axis):
    return all_reduce(x, axis, dtype=torch.float32)


def sums_in_its_own_order(x, axis):
    total, moving = x.clone(), x
    for _ in range(axis.size - 1):
        moving = comm.exchange(moving, axis)
        total += moving
    return total


def whole_tensor_in_turn(x, axis):
    """The same bits everywhere, by a token that goes round twice: right, and N times too many bytes."""
    n, r = axis.size, axis.rank
    mine, total = x.clone(), x
    for step in range(2 * (n - 1)):
        came = comm.exchange(total, axis)
        total = came + mine if step == r - 1 else came if step >= n - 2 + r + 1 or step == r - 1 else total
    return total


def calls_all_reduce(x, axis):
    return comm.all_reduce(x, axis)


def two_messages_a_chunk(x, axis):
    n, r = axis.size, axis.rank
    parts = x.view(n, -1)                                                              # (N, numel/N)
    for step in range(2 * (n - 1)):
        sent = (r - step) % n if step < n - 1 else (r + n - step) % n
        came = torch.cat([comm.exchange(half, axis) for half in parts[sent].tensor_split(2)])
        parts[sent - 1] = parts[sent - 1] + came if step < n - 1 else came
    return x


SUM, BITS, BYTES = (criterion.name for criterion in ring_all_reduce.criteria)
MINE, CHUNKS = (criterion.name for criterion in ring_reduce_scatter.criteria)
MUTANTS = [
    Mutant("one step short", ring_reduce_scatter, one_step_short, MINE),
    Mutant("overwrites instead of adding", ring_reduce_scatter, overwrites, MINE),
    Mutant("adds to the chunk it sent", ring_reduce_scatter, adds_to_the_chunk_it_sent, MINE),
    Mutant("sends everything each step", ring_reduce_scatter, sends_everything_each_step, CHUNKS),
    Mutant("asks the library", ring_reduce_scatter, asks_the_library, CHUNKS),
    Mutant("never sends", ring_all_reduce, no_sends, SUM),
    Mutant("averages", ring_all_reduce, averages, SUM),
    Mutant("never gathers", ring_all_reduce, keeps_its_parts, SUM),
    Mutant("forgets the last hop", ring_all_reduce, forgets_the_last_hop, SUM),
    Mutant("sends float32", ring_all_reduce, sends_float32, BITS),
    Mutant("sums in its own order", ring_all_reduce, sums_in_its_own_order, BITS),
    Mutant("passes the whole tensor on", ring_all_reduce, whole_tensor_in_turn, BYTES),
    Mutant("calls all_reduce", ring_all_reduce, calls_all_reduce, BYTES),
    Mutant("two messages a chunk", ring_all_reduce, two_messages_a_chunk, BYTES),
]
