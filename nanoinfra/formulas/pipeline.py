"""Pipelines in numbers: which layers a stage gets, how long it idles, what it keeps, what it sends.

    gpipe, 1f1b   idle (p-1)(F+B+W) of a step        fraction (p-1)/(m+p-1)
    interleaved   (p-1)(F+B+W)/v                     (p-1)/(v m+p-1)
    zb-h1         (p-1) max(F, B, F+B-W) for m >= p
F, B, W: seconds of a stage's forward and of its backward to inputs and to weights, for one micro-batch; p
stages, m micro-batches, v chunks a stage. Narayanan et al. 2021, section 2.2; Qi et al. 2023, table 2.
B sequences, T tokens, C width.
"""
from itertools import accumulate

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops
from nanoinfra.formulas.parameters import shapes


def split(config: ModelConfig, n: int, seq: int) -> list[tuple[int, int]]:
    """(first layer, one past the last) of each of `n` chunks: the costliest of them costs the least it can.

    A chunk costs its layers' FLOPs, the last one the head's too; the embedding, a look-up, has none. Layers
    are alike, so all but the last chunk share evenly, and those before get the fewer: they keep the most
    micro-batches. The last may be the head alone. Raises ValueError where chunks outnumber the layers.
    """
    L = config.layers
    if n > L:
        raise ValueError(f"{n} chunks cannot share {L} layers; pp x virtual is at most {L}")
    if n == 1:
        return [(0, L)]
    layer, head = _costs(config, seq)

    def costs(last):                                                     # layers of the last chunk
        each = [size * layer for size in _share(L - last, n - 1)] + [last * layer + head]
        return max(each), sum(cost ** 2 for cost in each)
    last = min(range(L - n + 2), key=costs)
    ends = [*accumulate(_share(L - last, n - 1)), L]
    return list(zip([0, *ends], ends))


def chunk_names(config: ModelConfig, n: int, seq: int) -> list[list[str]]:
    """The names of the parameters of each of `n` chunks; a tied matrix is the first's and the last's."""
    borders, names = split(config, n, seq), [[] for _ in range(n)]
    for name in shapes(config):
        head, layer = name.split(".")[:2]
        if head == "blocks":
            chunk = next(i for i, (_, stop) in enumerate(borders) if int(layer) < stop)
        else:
            chunk = n - 1 if head in ("norm", "head") else 0
        names[chunk].append(name)
    if config.tied and n > 1:
        names[-1].append("embed.weight")
    return names


def chunk_flops(config: ModelConfig, n: int, seq: int) -> list[float]:
    """Forward FLOPs a token of each of `n` chunks."""
    layer, head = _costs(config, seq)
    return [(stop - start) * layer + head * (i == n - 1)
            for i, (start, stop) in enumerate(split(config, n, seq))]


def idle(kind: str, p: int, m: int, F: float, B: float, W: float, v: int = 1) -> float:
    """Seconds of a step in which a stage computes nothing, all stages alike and messages free.

    zb-h1 with m < p: exact where W <= min(F, B), from Qi et al. With m >= p the paper's (p-1)(F+B-W) is the
    term that leads while W <= min(F, B): rank 0 cannot begin its first backward before p F + (p-1) B, so it
    idles (p-1) B at least, and the last rank waits (p-1) F for its first input. Raises ValueError elsewhere.
    """
    if kind in ("gpipe", "1f1b"):
        return (p - 1) * (F + B + W)
    if kind == "interleaved":
        return (p - 1) * (F + B + W) / v
    if kind != "zb-h1":
        raise ValueError(f"no schedule is called {kind!r}; there are gpipe, 1f1b, interleaved and zb-h1")
    if m >= p:
        return (p - 1) * max(F, B, F + B - W)
    if W > min(F, B):
        raise ValueError(f"zb-h1 with {m} micro-batches on {p} stages and W {W} above F {F} or B {B} has no "
                         f"closed form here; give at least {p} micro-batches")
    return (p - 1) * (F + B) - (m - 1) * W


def bubble(p: int, m: int, v: int = 1) -> float:
    """The share of a step that a stage idles: gpipe, 1f1b (v = 1), interleaved."""
    return (p - 1) / (v * m + p - 1)


def in_flight(kind: str, p: int, r: int, m: int, v: int = 1) -> int:
    """The most micro-batches, by chunk, of which stage `r` keeps activations at a time."""
    ahead = {"gpipe": m, "1f1b": p - r, "zb-h1": p, "interleaved": 2 * (p - 1 - r) + (v - 1) * p + 1}[kind]
    return min(ahead, m * v)


def message_bytes(config: ModelConfig, batch: int, seq: int, itemsize: int) -> int:
    """Bytes of a message between stages: B T C numbers. Under sequence parallelism a rank sends 1/t of it."""
    return batch * seq * config.width * itemsize


def sent_bytes(config: ModelConfig, p: int, m: int, batch: int, seq: int, itemsize: int,
               v: int = 1) -> list[int]:
    """Bytes each stage sends in a step: a message for every micro-batch and chunk border, there and back."""
    each = m * message_bytes(config, batch, seq, itemsize)
    borders = [v * 2 - (r == 0) - (r == p - 1) for r in range(p)]        # borders of its chunks
    return [each * borders[r] for r in range(p)]


def _costs(config, seq):
    """Forward FLOPs a token: (of a layer, of the head)."""
    terms = forward_flops(config, seq)
    head = terms.pop("head")
    return sum(terms.values()) / config.layers, head


def _share(layers, n):
    return [(layers + i) // n for i in range(n)]
