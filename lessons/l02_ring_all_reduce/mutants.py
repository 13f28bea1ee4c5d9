"""Known-wrong rings: each has one mistake that a check must find."""
import torch

from lessons.l02_ring_all_reduce import checks as check
from nanoinfra.distributed import comm
from nanoinfra.distributed.ring_collectives import ring_all_gather, ring_all_reduce
from nanoinfra.lab.mutants import Mutant, patched


def reduce_scatter(x, axis, hops=None, first=-1, add=torch.add, dtype=None):
    """The right one, with a place for each slip."""
    n, rank = axis.size, axis.rank
    partial = x[(rank + first) % n]
    for step in range(1, n if hops is None else hops(n)):
        came = comm.ring_shift(partial.to(dtype or x.dtype), axis).to(x.dtype)
        partial = add(came, x[(rank + first - step) % n])
    return partial


def all_reduce(x, axis, **slip):
    """Reduce-scatter with a slip, then a right all-gather."""
    return x.copy_(ring_all_gather(reduce_scatter(x.view(axis.size, -1), axis, **slip), axis).view(-1))


def one_hop_short(x, axis):
    return reduce_scatter(x, axis, hops=lambda n: n - 1)


def passes_on_without_adding(x, axis):
    return reduce_scatter(x, axis, add=lambda came, mine: came)


def starts_with_its_own_row(x, axis):
    return reduce_scatter(x, axis, first=0)


def sends_every_row(x, axis, tag=""):
    n, rank = axis.size, axis.rank
    partial = x.clone()
    for step in range(1, n):
        row = (rank - 1 - step) % n
        partial[row] = comm.ring_shift(partial, axis)[row] + x[row]
    return partial[rank]


def asks_the_library_to_scatter(x, axis):
    return comm.reduce_scatter(x, axis)


def never_sends(x, axis):
    return x


def averages(x, axis):
    return ring_all_reduce(x, axis).div_(axis.size)


def gathers_in_the_wrong_order(x, axis):
    mine = reduce_scatter(x.view(axis.size, -1), axis)
    return ring_all_gather(mine, axis).roll(1, 0).view(-1)


def returns_a_new_tensor(x, axis):
    return ring_all_reduce(x.clone(), axis)


def leaves_all_but_its_own_chunk(x, axis):
    parts = x.view(axis.size, -1)
    parts[axis.rank] = reduce_scatter(parts, axis)
    return ring_all_gather(parts[axis.rank], axis).view(-1)


def sums_float32(x, axis):
    return all_reduce(x, axis, dtype=torch.float32)


def sums_in_its_own_order(x, axis):
    total, moving = x.clone(), x
    for _ in range(axis.size - 1):
        moving = comm.ring_shift(moving, axis)
        total += moving
    return x.copy_(total)


def passes_the_whole_tensor_on(x, axis):
    """A token goes round twice: first to add up, then to tell. Right, and N times too many bytes."""
    n, rank = axis.size, axis.rank
    token = x.clone()
    for step in range(1, 2 * n - 1):
        came = comm.ring_shift(token, axis)
        if step == rank:
            token = came + x
        elif step >= n + rank or step < rank:
            token = came
    return x.copy_(token)


def asks_the_library(x, axis):
    return comm.all_reduce(x, axis)


def exchange_in_halves(x, axis, tag=""):
    return torch.cat([comm.ring_shift(half, axis, tag) for half in x.tensor_split(2)])


two_messages_a_chunk = patched(ring_all_reduce, "nanoinfra.distributed.ring_collectives:ring_shift",
                               exchange_in_halves)
scatters_all_rows = patched(ring_all_reduce, "nanoinfra.distributed.ring_collectives:ring_reduce_scatter",
                            sends_every_row)

MINE, ONLY, SHARE = (criterion.name for criterion in check.ring_reduce_scatter.criteria)
SUM, PLACE, BITS, ONLY_TOO, BYTES = (criterion.name for criterion in check.ring_all_reduce.criteria)
MUTANTS = [
    Mutant("one hop short", check.ring_reduce_scatter, one_hop_short, MINE),
    Mutant("passes on without adding", check.ring_reduce_scatter, passes_on_without_adding, MINE),
    Mutant("starts with its own row", check.ring_reduce_scatter, starts_with_its_own_row, MINE),
    Mutant("asks the library", check.ring_reduce_scatter, asks_the_library_to_scatter, ONLY),
    Mutant("sends every row", check.ring_reduce_scatter, sends_every_row, SHARE),
    Mutant("never sends", check.ring_all_reduce, never_sends, SUM),
    Mutant("averages", check.ring_all_reduce, averages, SUM),
    Mutant("gathers in the wrong order", check.ring_all_reduce, gathers_in_the_wrong_order, SUM),
    Mutant("returns a new tensor", check.ring_all_reduce, returns_a_new_tensor, PLACE),
    Mutant("leaves all but its own chunk", check.ring_all_reduce, leaves_all_but_its_own_chunk, PLACE),
    Mutant("sums float32", check.ring_all_reduce, sums_float32, BITS),
    Mutant("sums in its own order", check.ring_all_reduce, sums_in_its_own_order, BITS),
    Mutant("asks the library", check.ring_all_reduce, asks_the_library, ONLY_TOO),
    Mutant("passes the whole tensor on", check.ring_all_reduce, passes_the_whole_tensor_on, BYTES),
    Mutant("two messages a chunk", check.ring_all_reduce, two_messages_a_chunk, BYTES),
    Mutant("scatters all rows", check.ring_all_reduce, scatters_all_rows, BYTES),
]
