"""Pipeline parallelism: the layers of each stage, idle time and bubble, micro-batches in flight, bytes sent.

    gpipe, 1f1b   idle (p-1)(F+B+W) of a step        fraction (p-1)/(m+p-1)
    interleaved   (p-1)(F+B+W)/v                     (p-1)/(v m+p-1)
    zb-h1         (p-1) max(F, B, F+B-W) for m >= p
F, B, W: seconds of a stage's forward, backward for inputs and backward for weights of one micro-batch;
p stages, m micro-batches, v chunks a stage. Narayanan et al. 2021, section 2.2; Qi et al. 2023, table 2.
"""
from itertools import accumulate

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops
from nanoinfra.formulas.parameters import shapes


def split(config: ModelConfig, n: int, seq: int) -> list[tuple[int, int]]:
    """(first layer, one past the last) of each of `n` chunks, so that the costliest chunk costs the least.

    A chunk costs the FLOPs of its layers; the last one has the head too. The embedding, a look-up, has none.
    Layers are alike, so all chunks but the last get equal numbers of them, the first chunks one fewer where
    that is uneven: they keep the most micro-batches in flight. The last chunk may be the head alone.
    Raises ValueError where there are more chunks than layers.
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
    """The names of the parameters of each of `n` chunks; a tied weight is in the first and in the last."""
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
    """Seconds of a step in which a stage idles, where all stages cost the same and messages cost nothing.

    zb-h1 with m < p is exact where W <= min(F, B), from Qi et al.; elsewhere a ValueError says so. With
    m >= p the paper's (p-1)(F+B-W) is the largest term while W <= min(F, B): rank 0 cannot begin its first
    backward before p F + (p-1) B, so it idles at least (p-1) B, and the last rank waits (p-1) F for its first
    input.
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
    """The bubble: the share of a step that a stage idles, for gpipe, 1f1b (v = 1) and interleaved."""
    return (p - 1) / (v * m + p - 1)


def in_flight(kind: str, p: int, r: int, m: int, v: int = 1) -> int:
    """The most micro-batches in flight: stage `r` keeps activations of so many, counted by chunk."""
    ahead = {"gpipe": m, "1f1b": p - r, "zb-h1": p, "interleaved": 2 * (p - 1 - r) + (v - 1) * p + 1}[kind]
    return min(ahead, m * v)


def message_bytes(config: ModelConfig, batch: int, seq: int, itemsize: int) -> int:
    """Bytes of one message between stages: B T C numbers. With sequence parallelism a rank sends 1/t of it.
    """
    return batch * seq * config.width * itemsize


def sent_bytes(config: ModelConfig, p: int, m: int, batch: int, seq: int, itemsize: int,
               v: int = 1) -> list[int]:
    """Bytes that each stage sends in a step: a message a micro-batch and chunk border, in each direction."""
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
