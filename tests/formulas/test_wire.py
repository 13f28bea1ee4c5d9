import pytest

from nanoinfra.formulas.collectives import fit, ring_bytes, ring_seconds, ring_steps, tree_bytes, tree_seconds

CHUNKED = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def simulate_ring(op, n):
    """Chunks that each rank sends, one a round, until all have what the op promises: moved by hand."""
    terms = [[{r} for _ in range(n)] for r in range(n)]                                # terms[rank][chunk]
    sent = 0
    if op in ("all_reduce", "reduce_scatter"):
        for step in range(n - 1):
            moving = [(r, (r - 1 - step) % n, set(terms[r][(r - 1 - step) % n])) for r in range(n)]
            for r, chunk, what in moving:
                terms[(r + 1) % n][chunk] |= what
            sent += 1
        assert all(terms[r][r] == set(range(n)) for r in range(n))
    if op in ("all_reduce", "all_gather"):
        has = [{r} for r in range(n)]
        for step in range(n - 1):
            for r in range(n):
                assert (r - step) % n in has[r]
                has[(r + 1) % n].add((r - step) % n)
            sent += 1
        assert all(h == set(range(n)) for h in has)
    return sent


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_simulated_ring_agrees(op, n):
    chunks = simulate_ring(op, n)
    assert ring_bytes(op, 840 * n, n) == pytest.approx(840 * chunks, rel=1e-12)
    assert ring_steps(op, n) == chunks


@pytest.mark.parametrize("op, want", [("all_reduce", 1500), ("all_gather", 750), ("reduce_scatter", 750),
                                      ("all_to_all", 750), ("broadcast", 1000), ("exchange", 1000),
                                      ("send", 1000), ("recv", 1000), ("barrier", 0)])
def test_literal_bytes_on_four_ranks(op, want):
    assert ring_bytes(op, 1000, 4) == want
    assert ring_bytes(op, 1000, 1) == ring_steps(op, 1) == ring_seconds(op, 1000, 1, 1.0, 1.0) == 0


def test_all_reduce_is_reduce_scatter_and_all_gather():
    for n in range(1, 10):
        assert ring_bytes("all_reduce", 720, n) == pytest.approx(
            ring_bytes("reduce_scatter", 720, n) + ring_bytes("all_gather", 720, n))
        assert ring_steps("all_reduce", n) == ring_steps("reduce_scatter", n) + ring_steps("all_gather", n)


@pytest.mark.parametrize("op", CHUNKED)
def test_a_ring_does_not_grow_with_its_ranks(op):
    sent = [ring_bytes(op, 1.0, n) for n in range(2, 100)]
    assert sent == sorted(sent)
    assert sent[-1] < (2 if op == "all_reduce" else 1)


def test_seconds():
    assert ring_seconds("all_reduce", 4e6, 4, 20e-6, 2e9) == pytest.approx(6 * 20e-6 + 6e6 / 2e9)
    assert ring_seconds("send", 1e6, 2, 20e-6, 2e9) == pytest.approx(20e-6 + 0.5e-3)
    assert ring_seconds("barrier", 0, 3, 1e-3, 1.0) == pytest.approx(2e-3)


@pytest.mark.parametrize("n, depth", [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3)])
def test_tree(n, depth):
    assert tree_bytes(100, n) == 100 * depth
    assert tree_seconds(100, n, 0.5, 50) == 2 * depth * (0.5 + 2)


def test_trees_win_when_small_and_rings_when_large():
    for payload, tree_first in ((1e3, True), (1e9, False)):
        tree = tree_seconds(payload, 64, 20e-6, 2e9)
        assert (tree < ring_seconds("all_reduce", payload, 64, 20e-6, 2e9)) == tree_first


SIZES = [4096 * 4 ** k for k in range(8)]


@pytest.mark.parametrize("op, n", [("all_reduce", 2), ("all_reduce", 5), ("send", 2), ("all_gather", 3)])
@pytest.mark.parametrize("alpha, beta", [(20e-6, 1e9), (1e-3, 1e8), (0.0, 4e9)])
def test_fit_finds_what_the_times_were_made_of(op, n, alpha, beta):
    got = fit(op, n, {size: ring_seconds(op, size, n, alpha, beta) for size in SIZES})
    assert got.latency == pytest.approx(alpha, rel=1e-6, abs=1e-12)
    assert got.bandwidth == pytest.approx(beta, rel=1e-9)
    assert got.worst_miss < 1e-9


@pytest.mark.parametrize("wild", range(8))
def test_a_wild_time_does_not_bend_the_fit(wild):
    times = {size: ring_seconds("all_reduce", size, 2, 1e-3, 1e8) for size in SIZES}
    times[SIZES[wild]] *= 10
    got = fit("all_reduce", 2, times)
    assert (got.latency, got.bandwidth) == pytest.approx((1e-3, 1e8), rel=1e-6)
    assert got.worst_miss == pytest.approx(0.9) and got.mean_miss == pytest.approx(0.9 / 8)


def test_a_small_payload_counts_as_much_as_a_large_one():
    """A tenth of noise at each size: least squares in seconds would see the largest alone."""
    noise = [1.1, 0.9, 1.1, 0.9, 1.1, 0.9, 1.1, 0.9]
    times = {s: f * ring_seconds("all_reduce", s, 2, 1e-4, 1e9) for s, f in zip(SIZES, noise)}
    got = fit("all_reduce", 2, times)
    assert got.latency == pytest.approx(1e-4, rel=0.25) and got.bandwidth == pytest.approx(1e9, rel=0.25)
    assert got.mean_miss <= 0.1 + 1e-9


def test_latency_is_never_negative():
    got = fit("all_reduce", 2, {1000: 1e-6, 2000: 4e-6})            # a line through both starts below 0
    assert got.latency == 0.0 and got.bandwidth > 0


def test_one_rank_has_no_wire_to_fit():
    with pytest.raises(ValueError, match="shows no bandwidth; time two sizes"):
        fit("all_reduce", 1, {1000: 1e-6, 2000: 2e-6})
