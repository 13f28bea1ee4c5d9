import pytest

from nanoinfra.formulas.collectives import pull_seconds, ring_bytes, step_bytes


def test_from_one_server_to_zero_1():
    psi = 1_000_000                                    # bytes, and nine ranks
    assert step_bytes(psi, 9, 1) == (16 * psi, 2 * psi)                    # 2 Psi W, W = 8
    assert step_bytes(psi, 9, 4) == (2.5 * psi, 2 * psi)                   # 2 Psi W / S, W = 5
    server, worker = step_bytes(psi, 9, 9)
    assert server == worker == pytest.approx(ring_bytes("all_reduce", psi, 9))
    assert step_bytes(psi, 1, 1) == (0, 0)


def test_one_server_takes_a_workers_time_for_each_worker():
    one = pull_seconds(1000, 2, 1, latency=0.5, bandwidth=1000)
    assert one == 1.5
    assert pull_seconds(1000, 6, 1, 0.5, 1000) == 5 * one
    assert pull_seconds(1000, 6, 2, 0.5, 1000) == 4 * 1.0                  # half the weights a message
