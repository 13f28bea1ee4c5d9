"""Numbers that say whose they are, so that a wrong sum can be taken apart again.

Rank r's chunk c is filled with 8^(r n + c): in a sum over ranks, each base-8 digit counts how often one part
is in it. `counts` reads them, `words` says them: "holds the parts of ranks 0, 1, 3; rank 2's is missing".
Exact in float64 up to 4 ranks.
"""
import torch


def label(rank: int, chunk: int, n: int) -> float:
    """The number that stands for `rank`'s part of `chunk`, on an axis of `n` ranks with a chunk each."""
    return 8.0 ** (rank * n + chunk)


def counts(chunk: torch.Tensor, n: int) -> dict[tuple[int, int], int] | None:
    """{(rank, chunk): times it was added, -3 to 3} of a chunk of equal labels; None if it is no such sum."""
    first = chunk.flatten()[0].item()
    if not float(first).is_integer() or not (chunk == first).all():
        return None
    found, rest = {}, int(first)
    for place in range(n * n):
        digit = (rest + 3) % 8 - 3
        found[divmod(place, n)] = digit
        rest = (rest - digit) // 8
    return None if rest or 4 in found.values() else {part: times for part, times in found.items() if times}


def words(found: dict[tuple[int, int], int], chunk: int, n: int) -> str:
    """What a chunk holds, and which rank's part it lacks."""
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
