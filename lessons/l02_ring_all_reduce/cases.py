"""Test tensors for an all-reduce whose sums show which rank's chunks were added.

Rank r's chunk c is filled with 8^(r n + c), so that each base-8 digit of a sum counts how often one chunk is
in it. `count_labels` reads the digits, `describe_labels` says them: "holds the parts of ranks 0, 1, 3; rank
2's is missing". Exact in float64 up to 4 ranks.
"""
import torch


def chunk_label(rank: int, chunk: int, n: int) -> float:
    """The number that fills `rank`'s part of `chunk`, on an axis of `n` ranks with a chunk for each."""
    return 8.0 ** (rank * n + chunk)


def count_labels(chunk: torch.Tensor, n: int) -> dict[tuple[int, int], int] | None:
    """{(rank, chunk): how often it was added, -3 to 3} for a summed chunk; None if it is no sum of labels."""
    first = chunk.flatten()[0].item()
    if not float(first).is_integer() or not (chunk == first).all():
        return None
    found, rest = {}, int(first)
    for place in range(n * n):
        digit = (rest + 3) % 8 - 3
        found[divmod(place, n)] = digit
        rest = (rest - digit) // 8
    return None if rest or 4 in found.values() else {part: times for part, times in found.items() if times}


def describe_labels(found: dict[tuple[int, int], int], chunk: int, n: int) -> str:
    """Say in words which ranks' parts a chunk holds, and which are missing."""
    if not found:
        return "holds nothing, only zeros"
    mine = {rank: times for (rank, c), times in found.items() if c == chunk}
    said = [f"the {_of(mine, 'part')}"] if mine else []
    for other in sorted({c for _, c in found} - {chunk}):
        said.append(f"chunk {other} of {_of({r: t for (r, c), t in found.items() if c == other})}")
    lacks = [rank for rank in range(n) if rank not in mine]
    missing = f"; {_of(dict.fromkeys(lacks, 1))}'s {'is' if len(lacks) == 1 else 'are'} missing"
    return f"holds {' and '.join(said)}{missing if mine and lacks else ''}"


def _of(times, noun=""):
    many = "s" if len(times) > 1 else ""
    listed = ", ".join(f"{rank} ({t} x)" if t != 1 else f"{rank}" for rank, t in times.items())
    return f"{noun}{many} of rank{many} {listed}" if noun else f"rank{many} {listed}"
