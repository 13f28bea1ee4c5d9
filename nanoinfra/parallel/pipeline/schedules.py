"""Pipeline schedules: the instructions of each stage for one step, in order, as plain lists.

    gpipe        all forwards, then all backwards         idle (p-1)(F+B+W)      holds m micro-batches
    1f1b         one forward, one backward, in turns      the same               min(m, p-r)
    interleaved  1f1b with v chunks of layers a stage     (p-1)(F+B+W)/v         up to p v + p-1 chunks
    zb-h1        1f1b; weight gradients fill the bubble   (p-1) max(F, B, F+B-W) min(m, p)
p stages, r this one, m micro-batches; F, B, W: forward, backward for inputs, for weights. Huang et al. 2019;
Narayanan et al. 2021 (two of them); Qi et al. 2023. simulator.py simulates and checks, train/step.py runs it.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Forward:
    """Run the forward of `micro_batch` through this stage's `chunk`, and save what backward needs."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Run the backward of `micro_batch`. After a chunk's `is_last` its gradients are complete."""
    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class BackwardInput:
    """The first half of a backward: the gradient of the chunk's input, which the stage before waits for."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class BackwardWeight:
    """The second half of a backward: the gradients of the chunk's weights, which no stage waits for."""
    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class SendActivation:
    """Send the output of `chunk` for `micro_batch` to the stage of the next chunk."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class RecvActivation:
    """Start to receive the input of `chunk`. The Forward that needs it waits for it, not this instruction."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class SendGrad:
    """Send the gradient of `chunk`'s input to the stage that sent the input."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class RecvGrad:
    """Start to receive the gradient of `chunk`'s output."""
    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class ReduceGrads:
    """Wait until every gradient is summed over the data axis."""


@dataclass(frozen=True)
class OptimizerStep:
    """Clip the gradients and run the optimizer."""


def gpipe(num_stages: int, stage: int, num_micro_batches: int) -> Iterator:
    """All forwards, then all backwards. Huang et al. 2019."""
    yield from (Forward(k) for k in range(num_micro_batches))
    yield from (Backward(k) for k in range(num_micro_batches))


def one_f_one_b(num_stages: int, stage: int, num_micro_batches: int) -> Iterator:
    """As few forwards as keep the next stages busy, then forward and backward in turns.

    Narayanan et al. 2021, figure 3.
    """
    m = num_micro_batches
    warmup = min(m, num_stages - 1 - stage)
    yield from (Forward(k) for k in range(warmup))
    for k in range(m):
        if warmup + k < m:
            yield Forward(warmup + k)
        yield Backward(k)


def interleaved_1f1b(num_stages: int, stage: int, num_micro_batches: int, num_chunks: int) -> Iterator:
    """1F1B over the chunks of each stage: p micro-batches through one chunk, then through the next.

    Narayanan et al. 2021, figure 4.
    """
    p, m, v = num_stages, num_micro_batches, num_chunks
    if m % p:
        raise ValueError(f"the interleaved schedule sends micro-batches round in groups of pp, and pp {p} "
                         f"does not divide {m}; try {m + p - m % p} micro-batches, or --schedule 1f1b")
    total, warmup = m * v, min(m * v, 2 * (p - 1 - stage) + (v - 1) * p)

    def micro_batch_and_chunk(k):
        """Of the k-th forward."""
        return k // (p * v) * p + k % p, k // p % v
    yield from (Forward(*micro_batch_and_chunk(k)) for k in range(warmup))
    for k in range(total):
        if warmup + k < total:
            yield Forward(*micro_batch_and_chunk(warmup + k))
        micro_batch, chunk = micro_batch_and_chunk(k)
        yield Backward(micro_batch, v - 1 - chunk)


def zb_h1(num_stages: int, stage: int, num_micro_batches: int) -> Iterator:
    """1F1B in which stage r delays the weights' gradients by r micro-batches. Qi et al. 2023, section 3."""
    m = num_micro_batches
    warmup = min(m, num_stages - 1 - stage)
    yield from (Forward(k) for k in range(warmup))
    for k in range(m):
        if warmup + k < m:
            yield Forward(warmup + k)
        yield BackwardInput(k)
        if k >= stage:
            yield BackwardWeight(k - stage)
    yield from (BackwardWeight(k) for k in range(max(0, m - stage), m))


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved_1f1b, "zb-h1": zb_h1}


def build_pipeline_schedule(kind: str, num_stages: int, num_micro_batches: int,
                            num_chunks: int = 1) -> list[list]:
    """The instructions of each stage, with sends and receives, gradient reduction and optimizer step.

    `kind` is one of SCHEDULES. `num_chunks` a stage, for "interleaved" only. Raises ValueError where there is
    no such schedule.
    """
    check_schedule_config(kind, num_stages, num_micro_batches, num_chunks)
    chunks = (num_chunks,) if kind == "interleaved" else ()
    orders = [list(SCHEDULES[kind](num_stages, stage, num_micro_batches, *chunks))
              for stage in range(num_stages)]
    return [[*mark_last_backwards(order), ReduceGrads(), OptimizerStep()]
            for order in insert_sends_and_recvs(orders, num_chunks)]


def gradient_accumulation_schedule(num_micro_batches: int) -> list:
    """The schedule of one stage: forward and backward of each micro-batch, one reduction, one step."""
    return build_pipeline_schedule("1f1b", 1, num_micro_batches)[0]


def forward_only_schedule(num_stages: int, num_chunks: int = 1) -> list[list]:
    """The forward of one micro-batch, for evaluation."""
    return insert_sends_and_recvs([[Forward(0, chunk) for chunk in range(num_chunks)]
                                   for _ in range(num_stages)], num_chunks)


def check_schedule_config(kind: str, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> None:
    """Raise ValueError, with the rule, where there is no such schedule."""
    p, v = num_stages, num_chunks
    if kind not in SCHEDULES:
        raise ValueError(f"a schedule is one of {', '.join(SCHEDULES)}, not {kind!r}")
    if v != 1 and kind != "interleaved":
        raise ValueError(f"{v} chunks a stage are the interleaved schedule's, and this is {kind}; "
                         "try --schedule interleaved, or --virtual-stages 1")
    if kind == "interleaved" and (v < 2 or p < 2):
        raise ValueError(f"the interleaved schedule needs two stages and two chunks a stage, not pp {p} and "
                         f"{v} chunks; try --pp 2 --virtual-stages 2, or --schedule 1f1b")
    if kind == "zb-h1" and p < 2:
        raise ValueError("zb-h1 fills the gaps of a pipeline, and one stage has none; try --pp 2, or "
                         "--schedule 1f1b")
    if kind == "interleaved":
        next(interleaved_1f1b(p, 0, num_micro_batches, v))


def message_peer(message: object, stage: int, num_stages: int) -> tuple[int, object]:
    """The other end of a send or receive of `stage`: (peer stage, its instruction)."""
    r, p = stage, num_stages
    micro_batch, chunk = message.micro_batch, message.chunk
    match message:
        case SendActivation():
            return ((r + 1) % p, RecvActivation(micro_batch, chunk + (r == p - 1)))
        case RecvActivation():
            return ((r - 1) % p, SendActivation(micro_batch, chunk - (r == 0)))
        case SendGrad():
            return ((r - 1) % p, RecvGrad(micro_batch, chunk - (r == 0)))
        case RecvGrad():
            return ((r + 1) % p, SendGrad(micro_batch, chunk + (r == p - 1)))
    raise TypeError(f"{message!r} is no message")


def required_recv_and_send(instruction: object, stage: int, num_stages: int,
                           num_chunks: int) -> tuple[object | None, object | None]:
    """(the receive that this instruction of `stage` needs before it, the send of what it computes)."""
    first, last = (0, 0), (num_stages - 1, num_chunks - 1)               # (stage, chunk) at the model's ends
    match instruction:
        case Forward(micro_batch, chunk):
            return (RecvActivation(micro_batch, chunk) if (stage, chunk) != first else None,
                    SendActivation(micro_batch, chunk) if (stage, chunk) != last else None)
        case Backward(micro_batch, chunk) | BackwardInput(micro_batch, chunk):
            return (RecvGrad(micro_batch, chunk) if (stage, chunk) != last else None,
                    SendGrad(micro_batch, chunk) if (stage, chunk) != first else None)
    return None, None


def insert_sends_and_recvs(orders: list[list], num_chunks: int) -> list[list]:
    """Add the messages to `orders` of computations, one list a stage.

    A computation's result is sent right after it. A receive starts two computations before the one that needs
    it, a forward and a backward: so the message travels beside them, and no schedule deadlocks even where a
    send blocks. From each sender, receives are in the order of its sends.
    """
    p, v = len(orders), num_chunks
    incoming = [[] for _ in orders]          # by receiving stage: (sender, receive), in the sender's order
    for r, order in enumerate(orders):
        for send in (required_recv_and_send(instruction, r, p, v)[1] for instruction in order):
            if send:
                receiver, recv = message_peer(send, r, p)
                incoming[receiver].append((r, recv))
    lists = []
    for r, order in enumerate(orders):
        recvs = _recvs_before(order, incoming[r], r, p, v)
        lists.append([])
        for i, instruction in enumerate(order):
            send = required_recv_and_send(instruction, r, p, v)[1]
            lists[r] += [*recvs[i], instruction, *([send] if send else [])]
    return lists


def mark_last_backwards(order: Iterable) -> list:
    """`order` with `is_last` set on each chunk's last backward that computes weight gradients."""
    order = list(order)
    last = {x.chunk: i for i, x in enumerate(order) if isinstance(x, (Backward, BackwardWeight))}
    return [replace(x, is_last=True) if i in last.values() else x for i, x in enumerate(order)]


def _recvs_before(order, incoming, r, p, v):
    """For each computation of stage `r` the receives to start before it."""
    needed_by = {required_recv_and_send(instruction, r, p, v)[0]: i for i, instruction in enumerate(order)}
    recvs = [[] for _ in order]
    for sender in dict.fromkeys(sender for sender, _ in incoming):
        earliest = len(order)
        for recv in reversed([recv for s, recv in incoming if s == sender]):
            earliest = min(earliest, max(0, needed_by[recv] - 2))        # no later than those sent after it
            recvs[earliest].insert(0, recv)
    return recvs
