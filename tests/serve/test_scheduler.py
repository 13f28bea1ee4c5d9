"""Blocks and scheduler without a model: any interleaving ends with an empty pool; who shares, who yields."""
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoinfra.serve.engine.block_pool import Blocks, chain, root
from nanoinfra.serve.engine.scheduler import QueueFull, Scheduler, Sequence


class Engine:
    """Does what an engine does, without a model: a step, and of each block whose tokens are in it."""

    def __init__(self, n=8, size=4, budget=6, seats=4, ends=9):
        self.blocks = Blocks(n, size)
        self.scheduler = Scheduler(self.blocks, budget, seats, queue=6)
        self.memory = [[None] * size for _ in range(n)]                    # what the keys are of
        self.ends, self.finished = ends, []                                # total tokens of each sequence

    @property
    def alive(self):
        return [*self.scheduler.running, *self.scheduler.waiting]

    def step(self):
        plan, size = self.scheduler.plan(), self.blocks.size
        assert sum(count for _, _, count in plan.work) <= self.scheduler.budget
        for source, to in plan.copies:
            self.memory[to] = list(self.memory[source])
        for sequence, first, count in plan.work:
            for place in range(first, first + count):
                block = sequence.table[place // size]
                assert self.blocks.holders[block] == 1, "writes where another reads"
                self.memory[block][place % size] = (sequence.root, tuple(sequence.tokens[:place + 1]))
        for sequence, first, count in plan.work:
            for place in range(first + count):                             # what attention would read
                kept = self.memory[sequence.table[place // size]][place % size]
                assert kept == (sequence.root, tuple(sequence.tokens[:place + 1])), "stale or another's"
        self.scheduler.done(plan)
        for sequence, first, count in plan.work:
            if first + count == len(sequence.tokens):
                self.sample(sequence)
        for sequence in plan.full:
            self.end(sequence)
        self.blocks.check(each.table for each in self.alive)
        return plan

    def sample(self, sequence):
        twins = [self.scheduler.fork(sequence) for _ in range(sequence.n - 1)]
        for i, each in enumerate([sequence, *twins]):
            each.tokens.append(1000 + i)
            if len(each.tokens) >= self.ends:
                self.end(each)

    def end(self, sequence):
        self.scheduler.finish(sequence)
        self.finished.append(sequence)

    def run(self, most=500):
        plans = []
        while self.alive:
            plans.append(self.step())
            assert plans[-1].work or plans[-1].full, "nobody goes on"
            assert len(plans) < most
        return plans


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=12)
actions = st.lists(st.one_of(
    st.tuples(st.just("add"), prompts, st.integers(1, 3), st.sampled_from(["", "other"])),
    st.tuples(st.just("step")), st.tuples(st.just("step")), st.tuples(st.just("forget")),
    st.tuples(st.just("abort"), st.integers(0, 9))), max_size=30)


@settings(max_examples=2000, deadline=None)
@given(actions, st.integers(4, 12), st.integers(1, 4), st.integers(1, 9))
def test_any_interleaving_ends_with_an_empty_pool(todo, n, size, budget):
    engine, version = Engine(n, size, budget), 0
    for what, *more in todo:
        if what == "add":
            tokens, forks, salt = more
            try:
                engine.scheduler.add(Sequence(list(tokens), forks, root("", version, salt)))
            except (QueueFull, ValueError):
                continue
        elif what == "step":
            engine.step()
        elif what == "forget":                                             # new weights: old keys are no use
            engine.blocks.forget()
            version += 1
        elif engine.alive:
            engine.scheduler.finish(engine.alive[more[0] % len(engine.alive)])
    engine.run()
    assert engine.blocks.used == 0 and len(engine.blocks.free) == n


def test_a_prompt_that_begins_as_another_shares_its_full_blocks():
    engine = Engine(n=16, budget=100, ends=20)
    first, second = Sequence([1] * 8 + [2]), Sequence([1] * 8 + [3, 3])
    engine.scheduler.add(first)
    engine.step()
    engine.scheduler.add(second)
    plan = engine.step()
    assert second.table[:2] == first.table[:2] and second.table[2] != first.table[2]
    assert second.hit == 8 and (second, 8, 2) in plan.work
    assert [engine.blocks.holders[block] for block in first.table] == [2, 2, 1]


@pytest.mark.parametrize("tokens, hit", [(8, 4), (9, 8), (4, 0), (3, 0)])
def test_one_token_is_computed_even_if_all_are_known(tokens, hit):
    engine = Engine(n=16, budget=100, ends=10)
    for _ in range(2):
        engine.scheduler.add(again := Sequence([1] * tokens))
        engine.run()
    assert again.hit == hit


@pytest.mark.parametrize("one, other", [(root("a"), root("b")), (root("", 1), root("", 2)),
                                        (root("", 0, "x"), root("", 0, "y")), (root("a", 1), root("a1"))])
def test_adapters_versions_and_salts_share_nothing(one, other):
    assert one != other
    engine = Engine(n=16, budget=100)
    for start in (one, other):
        engine.scheduler.add(last := Sequence([1] * 8, root=start))
        engine.run()
    assert last.hit == 0


def test_a_key_stands_for_everything_before():
    keys, others = [root()], [root()]
    chain(keys, [1, 2, 3, 4, 5, 6, 7], 3)
    chain(others, [9, 2, 3, 4, 5, 6, 7], 3)
    assert len(keys) == 3 and not set(keys[1:]) & set(others)
    chain(keys, [1, 2, 3, 4, 5, 6, 7, 8, 9], 3)
    again = [root()]
    chain(again, [1, 2, 3, 4, 5, 6, 7, 8, 9], 3)
    assert keys == again
    chain(joined := [root()], [12, 3, 4], 3)                               # not "1", "23", "4"
    chain(apart := [root()], [1, 23, 4], 3)
    assert joined != apart


def test_the_longest_unused_goes_first_and_a_sequences_end_before_its_start():
    blocks = Blocks(4, 1)
    table = [blocks.take() for _ in range(3)]
    for block, key in zip(table, (b"a", b"b", b"c")):
        blocks.learn(block, key)
    blocks.give_back(table)
    assert list(blocks.free) == [3, 2, 1, 0]                               # unknown, then tail to head
    assert blocks.take() == 3 and blocks.take() == 2
    assert blocks.find([b"a", b"b", b"c"]) == [0, 1] and blocks.find([b"c", b"a"]) == []


def test_a_block_given_back_twice_is_refused():
    blocks = Blocks(2, 4)
    block = blocks.take()
    blocks.give_back([block])
    with pytest.raises(ValueError, match="given back and nobody holds it"):
        blocks.give_back([block])


def test_long_prompts_go_in_chunks_and_others_decode_beside():
    engine = Engine(n=16, budget=4, ends=14)
    engine.scheduler.add(short := Sequence([1]))
    engine.step()
    engine.scheduler.add(long := Sequence([2] * 11))
    counts = [{each: count for each, _, count in engine.step().work} for _ in range(4)]
    assert [step[short] for step in counts] == [1] * 4                     # never starved
    assert [step.get(long) for step in counts] == [3, 3, 3, 2]


def test_the_last_that_came_yields_and_is_first_again():
    engine = Engine(n=4, size=2, budget=10, ends=7)
    first, second = Sequence([1, 1, 1]), Sequence([2, 2, 2])
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    plans = engine.run()
    assert [each for plan in plans for each in plan.preempted] == [second]
    assert engine.finished == [first, second] and second.preempted == 1
    assert second.tokens == [2] * 3 + [1000] * 4


def test_alone_and_too_large_it_ends_where_the_pool_does():
    engine = Engine(n=2, size=2, ends=100)
    engine.scheduler.add(only := Sequence([1, 1, 1]))
    engine.run()
    assert engine.finished == [only] and len(only.tokens) == 5             # four are kept, one is new


def test_forks_share_all_until_they_write():
    engine = Engine(n=16, budget=10, ends=9)
    engine.scheduler.add(Sequence([1] * 5, n=3))
    engine.step()
    a, b, c = engine.scheduler.running
    assert a.table == b.table == c.table and engine.blocks.used == 2
    plan = engine.step()
    assert len(plan.copies) == 2 and engine.blocks.used == 4               # the full block stays shared
    assert a.table[0] == b.table[0] == c.table[0] and len({each.table[1] for each in (a, b, c)}) == 3
    assert sorted(each.tokens[5] for each in (a, b, c)) == [1000, 1001, 1002]


def test_what_waits_is_bounded():
    blocks = Blocks(4, 4)
    scheduler = Scheduler(blocks, queue=2, queue_tokens=20)
    scheduler.add(Sequence([1] * 8))
    with pytest.raises(QueueFull, match="1 requests of 8 tokens wait; at most 2 of 20"):
        scheduler.add(Sequence([1] * 13))
    scheduler.add(Sequence([1]))
    with pytest.raises(QueueFull):
        scheduler.add(Sequence([1]))
    for bad, says in (([], "at least one"), ([1] * 16, "do not fit the KV memory, which holds 16")):
        with pytest.raises(ValueError, match=says):
            scheduler.add(Sequence(bad))
    with pytest.raises(ValueError, match="give 1 to 64"):
        scheduler.add(Sequence([1], n=65))


def test_no_more_seats_than_there_are():
    engine = Engine(n=40, budget=100, seats=3, ends=8)
    draw = random.Random(0)
    for _ in range(6):
        engine.scheduler.add(Sequence([draw.randrange(9) for _ in range(3)], n=draw.choice([1, 2])))
    while engine.alive:
        engine.step()
        assert len(engine.scheduler.running) <= 3
    assert len(engine.finished) >= 6


def test_a_fresh_one_computes_all_of_its_prompt():
    engine = Engine(n=16, budget=100)
    engine.scheduler.add(Sequence([1] * 8))
    engine.run()
    engine.scheduler.add(again := Sequence([1] * 8, fresh=True))
    engine.run()
    assert again.hit == 0
