import pytest

from nanoinfra.formulas.wire import ring_bytes, ring_seconds, ring_steps, tree_bytes, tree_seconds

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
