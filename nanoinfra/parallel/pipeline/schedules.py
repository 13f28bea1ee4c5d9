"""Schedules: what each stage of a pipeline does in a step, and in which order. Lists of words, nothing else.

    gpipe        all forwards, then all backwards         idle (p-1)(F+B+W)      holds m micro-batches
    1f1b         in turns, once the pipeline is full      the same               min(m, p-r)
    interleaved  v chunks of layers a stage, in turns     (p-1)(F+B+W)/v         up to p v + p-1 chunks
    zb-h1        1f1b; weights' gradients fill the gaps   (p-1) max(F, B, F+B-W) min(m, p)
p stages, r this one, m micro-batches; F, B, W: forward, backward to the inputs, to the weights. Huang et al.
2019; Narayanan et al. 2021 (two of them); Qi et al. 2023. clock.py replays and checks, train/step.py runs it.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Forward:
    """Run micro-batch `micro` through this stage's `chunk`, and keep what backward needs."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Turn micro-batch `micro` into gradients. After a chunk's `last` they are complete and may leave."""
    micro: int
    chunk: int = 0
    last: bool = False


@dataclass(frozen=True)
class BackwardInput:
    """The half of a backward that the stage before waits for: the gradient of the chunk's input."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardWeight:
    """The half that nobody waits for: the gradients of the chunk's weights."""
    micro: int
    chunk: int = 0
    last: bool = False


@dataclass(frozen=True)
class SendActivation:
    """What `chunk` made of micro-batch `micro` leaves for the next chunk's stage."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class RecvActivation:
    """Have a place ready for `chunk`'s input. Nobody waits here: its Forward does."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class SendGrad:
    """The gradient of `chunk`'s input leaves for the stage that sent the input."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class RecvGrad:
    """Have a place ready for the gradient of `chunk`'s output."""
    micro: int
    chunk: int = 0


@dataclass(frozen=True)
class ReduceGrads:
    """Wait until every gradient is the sum over the data axis."""


@dataclass(frozen=True)
class Step:
    """Clip, and let the optimizer move the weights."""


def gpipe(p: int, r: int, m: int) -> Iterator:
    """Fill, then drain. Huang et al. 2019."""
    yield from (Forward(k) for k in range(m))
    yield from (Backward(k) for k in range(m))


def one_f_one_b(p: int, r: int, m: int) -> Iterator:
    """As few forwards ahead as keep the next stages busy, then in turns. Narayanan et al. 2021, figure 3."""
    ahead = min(m, p - 1 - r)
    yield from (Forward(k) for k in range(ahead))
    for k in range(m):
        if ahead + k < m:
            yield Forward(ahead + k)
        yield Backward(k)


def interleaved(p: int, r: int, m: int, v: int) -> Iterator:
    """1F1B over v chunks: p micro-batches through one chunk, then through the next. The same, figure 4."""
    if m % p:
        raise ValueError(f"the interleaved schedule sends micro-batches round in groups of pp, and pp {p} "
                         f"does not divide {m}; try {m + p - m % p} micro-batches, or --schedule 1f1b")
    total, ahead = m * v, min(m * v, 2 * (p - 1 - r) + (v - 1) * p)

    def turn(k):
        """(micro-batch, chunk) of the k-th forward."""
        return k // (p * v) * p + k % p, k // p % v
    yield from (Forward(*turn(k)) for k in range(ahead))
    for k in range(total):
        if ahead + k < total:
            yield Forward(*turn(ahead + k))
        micro, chunk = turn(k)
        yield Backward(micro, v - 1 - chunk)


def zb_h1(p: int, r: int, m: int) -> Iterator:
    """1F1B whose stage r puts the weights' gradients off by r micro-batches. Qi et al. 2023, section 3."""
    ahead = min(m, p - 1 - r)
    yield from (Forward(k) for k in range(ahead))
    for k in range(m):
        if ahead + k < m:
            yield Forward(ahead + k)
        yield BackwardInput(k)
        if k >= r:
            yield BackwardWeight(k - r)
    yield from (BackwardWeight(k) for k in range(max(0, m - r), m))


ORDERS = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "zb-h1": zb_h1}


def schedule(kind: str, p: int, m: int, v: int = 1) -> list[list]:
    """The instructions of each of `p` stages for `m` micro-batches, messages, reduction and step included.

    `v` chunks a stage, for "interleaved" alone. Raises ValueError where the kind cannot do it.
    """
    check(kind, p, m, v)
    more = (v,) if kind == "interleaved" else ()
    orders = with_messages([list(ORDERS[kind](p, r, m, *more)) for r in range(p)], v)
    return [[*mark_last(order), ReduceGrads(), Step()] for order in orders]


def accumulate(m: int) -> list:
    """The schedule of one stage: forward and backward of each micro-batch, one reduction, one step."""
    return schedule("1f1b", 1, m)[0]


def evaluate(p: int, v: int = 1) -> list[list]:
    """One micro-batch forward, and not back."""
    return with_messages([[Forward(0, chunk) for chunk in range(v)] for _ in range(p)], v)


def check(kind: str, p: int, m: int, v: int = 1) -> None:
    """Raise ValueError, with the rule, where there is no such schedule."""
    if kind not in ORDERS:
        raise ValueError(f"a schedule is one of {', '.join(ORDERS)}, not {kind!r}")
    if v != 1 and kind != "interleaved":
        raise ValueError(f"{v} chunks a stage are the interleaved schedule's, and this is {kind}; "
                         "try --schedule interleaved, or --virtual 1")
    if kind == "interleaved" and (v < 2 or p < 2):
        raise ValueError(f"the interleaved schedule needs two stages and two chunks a stage, not pp {p} and "
                         f"{v} chunks; try --pp 2 --virtual 2, or --schedule 1f1b")
    if kind == "zb-h1" and p < 2:
        raise ValueError("zb-h1 fills the gaps of a pipeline, and one stage has none; try --pp 2, or "
                         "--schedule 1f1b")
    if kind == "interleaved":
        next(interleaved(p, 0, m, v))


def neighbour(instruction, r: int, p: int) -> tuple[int, object]:
    """The other end of a message of stage `r`: (stage, its instruction)."""
    micro, chunk = instruction.micro, instruction.chunk
    match instruction:
        case SendActivation():
            return ((r + 1) % p, RecvActivation(micro, chunk + (r == p - 1)))
        case RecvActivation():
            return ((r - 1) % p, SendActivation(micro, chunk - (r == 0)))
        case SendGrad():
            return ((r - 1) % p, RecvGrad(micro, chunk - (r == 0)))
        case RecvGrad():
            return ((r + 1) % p, SendGrad(micro, chunk + (r == p - 1)))
    raise TypeError(f"{instruction!r} is no message")


def messages(instruction, r: int, p: int, v: int) -> tuple[object | None, object | None]:
    """(what must have come before this instruction of stage `r`, what it makes for another stage)."""
    match instruction:
        case Forward(micro, chunk):
            return (RecvActivation(micro, chunk) if (r, chunk) != (0, 0) else None,
                    SendActivation(micro, chunk) if (r, chunk) != (p - 1, v - 1) else None)
        case Backward(micro, chunk) | BackwardInput(micro, chunk):
            return (RecvGrad(micro, chunk) if (r, chunk) != (p - 1, v - 1) else None,
                    SendGrad(micro, chunk) if (r, chunk) != (0, 0) else None)
    return None, None


def with_messages(orders: list[list], v: int) -> list[list]:
    """`orders` of computations, one a stage, with their messages.

    What a computation makes leaves right after it. A place for what one needs is ready two computations
    earlier, a forward and a backward: so the message travels beside them, and no stage waits for ever even
    where a send blocks. On each way places are in the order in which the other end sends.
    """
    p, coming, lists = len(orders), [[] for _ in orders], []
    for r, order in enumerate(orders):
        for made in (messages(instruction, r, p, v)[1] for instruction in order):
            if made:
                stage, wanted = neighbour(made, r, p)
                coming[stage].append((r, wanted))
    for r, order in enumerate(orders):
        ready = _places(order, coming[r], r, p, v)
        lists.append([])
        for i, instruction in enumerate(order):
            made = messages(instruction, r, p, v)[1]
            lists[r] += [*ready[i], instruction, *([made] if made else [])]
    return lists


def mark_last(order: Iterable) -> list:
    """`order`, where each chunk's last backward to its weights says so."""
    order = list(order)
    last = {x.chunk: i for i, x in enumerate(order) if isinstance(x, (Backward, BackwardWeight))}
    return [replace(x, last=True) if i in last.values() else x for i, x in enumerate(order)]


def _places(order, coming, r, p, v):
    """For each computation of stage `r` the receives to post before it."""
    needed = {messages(instruction, r, p, v)[0]: i for i, instruction in enumerate(order)}
    ready = [[] for _ in order]
    for sender in dict.fromkeys(sender for sender, _ in coming):
        soonest = len(order)
        for wanted in reversed([wanted for s, wanted in coming if s == sender]):
            soonest = min(soonest, max(0, needed[wanted] - 2))          # no later than those sent after it
            ready[soonest].insert(0, wanted)
    return ready
