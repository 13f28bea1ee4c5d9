"""Pipeline parallelism: the layers of each stage, idle time and bubble, micro-batches in flight, bytes sent.

    gpipe, 1f1b   idle (p-1)(F+B+W) of a step        fraction (p-1)/(m+p-1)
    interleaved   (p-1)(F+B+W)/v                     (p-1)/(v m+p-1)
    zb-h1         (p-1) max(F, B, F+B-W) for m >= p
F, B, W: seconds of a stage's forward, backward for inputs and backward for weights of one micro-batch;
p stages, m micro-batches, v chunks a stage. Narayanan et al. 2021, section 2.2; Qi et al. 2023, table 2.
"""
from itertools import accumulate

from nanoinfra.config import ModelConfig
from nanoinfra.formulas.flops import forward_flops_per_token
from nanoinfra.formulas.parameters import parameter_shapes


def split_layers_into_chunks(config: ModelConfig, num_chunks: int, seq: int) -> list[tuple[int, int]]:
    """(first layer, one past the last) of each chunk, so that the costliest chunk costs the least.

    A chunk costs the FLOPs of its layers; the last one has the head too. The embedding, a look-up, has none.
    Layers are alike, so all chunks but the last get equal numbers of them, the first chunks one fewer where
    that is uneven: they keep the most micro-batches in flight. The last chunk may be the head alone.
    Raises ValueError where there are more chunks than layers.
    """
    L = config.layers
    if num_chunks > L:
        raise ValueError(f"{num_chunks} chunks cannot share {L} layers; pp x virtual-stages is at most {L}")
    if num_chunks == 1:
        return [(0, L)]
    layer, head = _costs(config, seq)

    def costs(last):                                                     # layers of the last chunk
        each = [size * layer for size in _share(L - last, num_chunks - 1)] + [last * layer + head]
        return max(each), sum(cost ** 2 for cost in each)
    last = min(range(L - num_chunks + 2), key=costs)
    ends = [*accumulate(_share(L - last, num_chunks - 1)), L]
    return list(zip([0, *ends], ends))


def chunk_parameter_names(config: ModelConfig, num_chunks: int, seq: int) -> list[list[str]]:
    """The names of the parameters of each chunk; a tied weight is in the first and in the last."""
    borders = split_layers_into_chunks(config, num_chunks, seq)
    names = [[] for _ in range(num_chunks)]
    for name in parameter_shapes(config):
        head, layer = name.split(".")[:2]
        if head == "blocks":
            chunk = next(i for i, (_, stop) in enumerate(borders) if int(layer) < stop)
        else:
            chunk = num_chunks - 1 if head in ("norm", "head") else 0
        names[chunk].append(name)
    if config.tied and num_chunks > 1:
        names[-1].append("embed.weight")
    return names


def pipeline_idle_seconds(schedule: str, p: int, m: int, F: float, B: float, W: float, v: int = 1) -> float:
    """Seconds of a step in which a stage idles, where all stages cost the same and messages cost nothing.

    zb-h1 with m < p is exact where W <= min(F, B), from Qi et al.; elsewhere a ValueError says so. With
    m >= p the paper's (p-1)(F+B-W) is the largest term while W <= min(F, B): rank 0 cannot begin its first
    backward before p F + (p-1) B, so it idles at least (p-1) B, and the last rank waits (p-1) F for its first
    input.
    """
    if schedule in ("gpipe", "1f1b"):
        return (p - 1) * (F + B + W)
    if schedule == "interleaved":
        return (p - 1) * (F + B + W) / v
    if schedule != "zb-h1":
        raise ValueError(f"no schedule is called {schedule!r}; there are gpipe, 1f1b, interleaved and zb-h1")
    if m >= p:
        return (p - 1) * max(F, B, F + B - W)
    if W > min(F, B):
        raise ValueError(f"zb-h1 with {m} micro-batches on {p} stages and W {W} above F {F} or B {B} has no "
                         f"closed form here; give at least {p} micro-batches")
    return (p - 1) * (F + B) - (m - 1) * W


def pipeline_bubble_fraction(p: int, m: int, v: int = 1) -> float:
    """The bubble: the share of a step that a stage idles, for gpipe, 1f1b (v = 1) and interleaved."""
    return (p - 1) / (v * m + p - 1)


def predicted_micro_batches_in_flight(schedule: str, p: int, r: int, m: int, v: int = 1) -> int:
    """The most micro-batches in flight: stage `r` keeps activations of so many, counted by chunk."""
    ahead = {"gpipe": m, "1f1b": p - r, "zb-h1": p, "interleaved": 2 * (p - 1 - r) + (v - 1) * p + 1}
    return min(ahead[schedule], m * v)


def stage_message_bytes(config: ModelConfig, batch: int, seq: int, dtype_bytes: int) -> int:
    """Bytes of one message between stages: B T C numbers; with sequence parallelism a rank sends 1/t."""
    return batch * seq * config.width * dtype_bytes


def pipeline_sent_bytes_per_stage(config: ModelConfig, p: int, m: int, batch: int, seq: int, dtype_bytes: int,
                                  v: int = 1) -> list[int]:
    """Bytes that each stage sends in a step: a message a micro-batch and chunk border, in each direction."""
    each = m * stage_message_bytes(config, batch, seq, dtype_bytes)
    borders = [v * 2 - (r == 0) - (r == p - 1) for r in range(p)]        # borders of its chunks
    return [each * borders[r] for r in range(p)]


def _costs(config, seq):
    """Forward FLOPs a token: (of a layer, of the head)."""
    terms = forward_flops_per_token(config, seq)
    head = terms.pop("head")
    return sum(terms.values()) / config.layers, head


def _share(layers, num_chunks):
    return [(layers + i) // num_chunks for i in range(num_chunks)]
