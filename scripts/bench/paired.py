"""Two ways of doing the same work, timed in turn: A B, B A, A B, ... and the ratio pair by pair.

The machine drifts, so single times say little; the median of the ratios, with an interval from order
statistics, does. "At least the peer" means that the interval's lower end is 0.97 or more.
"""
from collections.abc import Callable
from math import comb
from statistics import median


def alternate(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Run both `pairs` times, whoever went second going first; each returns its rate (work per second)."""
    rates = []
    for i in range(pairs):
        if i % 2:
            theirs, mine = peer(), ours()
        else:
            mine, theirs = ours(), peer()
        rates.append((mine, theirs))
    return rates


def interval(ratios: list[float], coverage: float = 0.95) -> tuple[float, float]:
    """The narrowest pair of order statistics to hold the true median with at least `coverage` (binomial)."""
    n, ordered = len(ratios), sorted(ratios)
    k = 0
    while 1 - 2 * sum(comb(n, i) for i in range(k + 2)) / 2**n >= coverage:
        k += 1
    return ordered[k], ordered[n - 1 - k]


def summary(name: str, rates: list[tuple[float, float]], unit: str) -> dict:
    """All pairs, the medians, the ratio with its interval; printed and returned."""
    ratios = [mine / theirs for mine, theirs in rates]
    low, high = interval(ratios)
    result = {"name": name, "unit": unit, "pairs": rates, "ours": median(r[0] for r in rates),
              "peer": median(r[1] for r in rates), "ratio": median(ratios), "interval": [low, high]}
    print(f"\n{name}: {len(rates)} pairs, {unit}")
    for (mine, theirs), ratio in zip(rates, ratios):
        print(f"  ours {mine:10,.0f}   peer {theirs:10,.0f}   ratio {ratio:.3f}")
    verdict = "at least the peer" if low >= 0.97 else "below the peer"
    print(f"  median ours {result['ours']:,.0f}, peer {result['peer']:,.0f}; ratio {result['ratio']:.3f} "
          f"[{low:.3f}, {high:.3f}] -> {verdict}", flush=True)
    return result
