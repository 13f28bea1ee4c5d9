import random

import pytest

from nanoinfra.config import config_for_size
from nanoinfra.formulas import paged_kv_memory as kv

TRACE = [(0, 3, 5), (0, 4, 1), (1, 2, 2), (1, 9, 4), (12, 1, 3)]


def test_blocks_and_what_is_empty_in_the_last():
    for size in (1, 4, 16):
        for tokens in range(1, 50):
            n, left = kv.blocks_for_tokens(tokens, size), kv.unused_slots_in_last_block(tokens, size)
            assert n * size == tokens + left and 0 <= left < size
        every = [kv.unused_slots_in_last_block(tokens, size) for tokens in range(1, 16 * 5 + 1)]
        assert sum(every) / len(every) == kv.mean_unused_slots_per_sequence(size)
    assert kv.kv_tokens_at_end(3, 1) == 3                # its one token is made and never read


def test_steps_by_hand():
    assert kv.static_batching_steps(TRACE, 2) == 15      # (5, 1) until 5, (2, 4) until 9; 12 to 15
    assert kv.static_batching_steps(TRACE, 1) == 5 + 1 + 2 + 4 + 3
    assert kv.continuous_batching_steps(TRACE, 2) == 15  # 5; 1, 3, 7 on the other seat; 12 to 15
    assert kv.continuous_batching_steps(TRACE[:4], 2) == 7 and kv.static_batching_steps(TRACE[:4], 2) == 9
    assert kv.unlimited_batching_steps(TRACE) == 15
    assert kv.unlimited_batching_steps(TRACE[:4]) == 5


def test_a_batch_takes_only_who_has_come():
    assert kv.static_batching_steps([(0, 1, 4), (1, 1, 4)], 2) == 8
    assert kv.static_batching_steps([(0, 1, 4), (0, 1, 4)], 2) == 4


def test_more_seats_never_hurt_orca_and_one_seat_is_one_after_another():
    draw = random.Random(0)
    trace = sorted((draw.randrange(20), draw.randint(1, 9), draw.randint(1, 30)) for _ in range(40))
    got = [kv.continuous_batching_steps(trace, seats) for seats in (1, 2, 4, 8, 40)]
    assert got == sorted(got, reverse=True) and got[-1] == kv.unlimited_batching_steps(trace)
    assert got[0] == kv.static_batching_steps(trace, 1)
    for seats in (2, 4, 8):
        static = kv.static_batching_steps(trace, seats)
        orca = kv.continuous_batching_steps(trace, seats)
        assert kv.min_steps_with_kv_memory(trace, seats * 64, 1, 64) <= orca <= static


def test_the_fullest_step_and_what_memory_allows():
    trace = [(0, 4, 3), (1, 2, 1)]                         # 4 5 6 tokens, and 2 beside the 5
    assert kv.peak_blocks_in_use(trace, 4) == 3 and kv.peak_blocks_in_use(trace,
                                                                                                    1) == 7
    assert kv.min_steps_with_kv_memory(trace, 4, 4) == 1 + 2 + 2 + 1
    assert kv.min_steps_with_kv_memory(trace, 8, 4, reserved_len=16) == (3 + 1) * 16 / 8


@pytest.mark.parametrize("prefix, saved", [(16, 8), (19, 8), (3, 0), (4, 2)])
def test_full_blocks_of_a_prefix_are_saved_by_all_but_the_first(prefix, saved):
    assert kv.blocks_saved_by_prefix_caching(prefix, 3, 4) == saved


def test_what_a_served_trace_sends():
    config = config_for_size("test")                                 # L 4, C 32, V 257
    assert kv.tp_serving_collectives(config, 1, 9, 50, 20, 4) == {"layers": (0, 0), "ends": (0,
                                                                                                          0)}
    got = kv.tp_serving_collectives(config, 2, 9, 50, 20, 4)
    assert got == {"layers": (72, 8 * 50 * 32 * 4), "ends": (18, 50 * 32 * 4 + 20 * 258 * 4)}
