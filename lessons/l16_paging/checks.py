"""Checks of lesson 16: a block pool with reference counts, and one step of a scheduler."""
from lessons.l16_paging import cases
from nanoinfra.lab.check import Check, CriterionNotMet

PREDICTIONS = {"L16.waste_whole": "tokens", "L16.waste_pages": "tokens", "L16.steps_static": "steps",
               "L16.steps_orca": "steps", "L16.steps_paged": "steps", "L16.peak": "blocks",
               "L16.saved": "blocks"}
Pool = Check("Pool")
plan = Check("plan")
CHECKS = (Pool, plan)


@Pool.criterion("a taken block has one holder", "property")
def _(subject):
    pool = subject(3, 4)
    got = [pool.allocate() for _ in range(3)]
    if sorted(got) != [0, 1, 2]:
        raise CriterionNotMet(f"a pool of 3 gives blocks {got}, want each of 0, 1, 2 once: still among the "
                              "free?")
    if list(pool.ref_counts) != [1, 1, 1]:
        raise CriterionNotMet(f"three blocks are taken and have {list(pool.ref_counts)} holders, want 1 each")
    if len(pool.free_blocks):
        raise CriterionNotMet(f"all three blocks are taken, and {list(pool.free_blocks)} are free")
    _raises(pool.allocate, IndexError, "a fourth block of a pool of three")


@Pool.criterion("a block is free when its last holder is gone", "property")
def _(subject):
    pool = subject(3, 4)
    a, b = pool.allocate(), pool.allocate()
    pool.incref(a)
    _holders(pool, {a: 2, b: 1}, "one of two taken blocks is shared")
    pool.free([a, b])
    _holders(pool, {a: 1, b: 0}, "a sequence that held both is gone, another still reads the shared one")
    if a in pool.free_blocks:
        raise CriterionNotMet(f"block {a} is free, and a sequence reads it still")
    if b not in pool.free_blocks:
        raise CriterionNotMet(f"nobody holds block {b} any more, and it is not free: lost for ever")
    pool.free([a])
    if sorted(pool.free_blocks) != [0, 1, 2]:
        raise CriterionNotMet(f"all have left, and blocks {sorted(pool.free_blocks)} are free, want 0, 1, 2")


@Pool.criterion("who writes where another reads gets a block of its own", "property")
def _(subject):
    pool = subject(4, 4)
    table = [pool.allocate(), pool.allocate()]
    other = list(table)
    for block in table:
        pool.incref(block)
    copied, old = pool.write(table, 1), other[1]
    if table[1] == old:
        raise CriterionNotMet(f"two sequences hold block {old}; who is to write into it still has it in its "
                              "table")
    if table[0] != other[0]:
        raise CriterionNotMet("place 0 of the table changed, and place 1 was to be written")
    if copied != (old, table[1]):
        raise CriterionNotMet(f"write returned {copied}, want {(old, table[1])}: which block to copy, and "
                              "where to")
    _holders(pool, {old: 1, table[1]: 1, table[0]: 2}, "one of two holders has a copy now")
    again = table[1]
    if (got := pool.write(table, 1)) is not None or table[1] != again:
        raise CriterionNotMet(f"block {again} is its writer's alone; write returned {got} and its table has "
                              f"{table[1]}, want None and no other block: nothing is to be copied")
    if (got := pool.write(other, 1)) is not None:
        raise CriterionNotMet(f"the other one is alone with block {old} by now; write returned {got}, want "
                              "None")


@Pool.criterion("a write that finds no free block changes nothing", "property")
def _(subject):
    pool = subject(1, 4)
    table = [pool.allocate()]
    pool.incref(table[0])
    _raises(lambda: pool.write(table, 0), IndexError, "a copy where no block is free")
    if table != [0] or list(pool.ref_counts) != [2]:
        raise CriterionNotMet(f"no block was free for the copy; now the table is {table} and block 0 has "
                              f"{pool.ref_counts[0]} holders, want [0] and 2: take before you give back")


@Pool.criterion("what nobody holds cannot be given back", "property")
def _(subject):
    pool = subject(2, 4)
    table = [pool.allocate()]
    pool.free(table)
    if len(table) != 1:
        raise CriterionNotMet(f"a table of one block is given back and is {table} now: it stays as it is")
    _raises(lambda: pool.free(table), ValueError, "a block given back twice")


@Pool.criterion("any order of calls, as the tables have it", "parity")
def _(subject):
    for seed in range(40):
        pool, ledger, done = subject(4, 4), cases.Ledger(4), []
        for what, which in cases.calls(seed):
            if _ask(pool, ledger, what, which):
                done.append(what)
            where = f"after {', '.join(done[-6:])} (seed {seed})"
            _holders(pool, dict(enumerate(ledger.holders)), where)
            free = [block for block, holders in enumerate(ledger.holders) if not holders]
            if sorted(pool.free_blocks) != free:
                raise CriterionNotMet(f"{where}: blocks {sorted(pool.free_blocks)} are free, want {free}: a "
                                      "block is free or held, and once")


def _ask(pool, ledger, what, which):
    """Do it to both, where it can be done."""
    tables = ledger.tables
    mine = tables[which % len(tables)] if tables else None
    if what == "take" and not ledger.full:
        if which % 2 and mine:
            mine.append(pool.allocate())
        else:
            tables.append([pool.allocate()])
    elif what == "share" and mine:
        for block in mine:
            pool.incref(block)
        tables.append(list(mine))
    elif what == "give back" and mine:
        pool.free(list(mine))
        tables.remove(mine)
    elif what == "write" and mine and not (ledger.full and ledger.holders[mine[-1]] > 1):
        pool.write(mine, len(mine) - 1)
    else:
        return False
    return True


def _holders(pool, want, where):
    for block, holders in want.items():
        if pool.ref_counts[block] != holders:
            raise CriterionNotMet(f"{where}: block {block} has {pool.ref_counts[block]} holders, "
                                  f"want {holders}")


def _raises(call, error, what):
    try:
        got = call()
    except error:
        return
    except (NotImplementedError, NameError):                             # not written yet, or not imported
        raise
    except Exception as other:
        raise CriterionNotMet(f"{what}: {type(other).__name__}: {other}, want {error.__name__}") from other
    raise CriterionNotMet(f"{what}: returned {got}, want {error.__name__}")


@plan.criterion("goes on from what is computed, within the budget", "property")
def _(subject):
    for before, after, work in cases.planned(subject):
        if (total := sum(count for *_, count in work)) > before.budget:
            raise CriterionNotMet(f"{before}: plans {total} tokens: is what is left of the budget less each "
                                  "time?")
        _queues(before, after, work)
        for sequence, first, count in work:
            if sequence in after.waiting:                                # was sent away again: see below
                continue
            if first != sequence.num_computed_tokens:
                why = ": plan adds nothing to `num_computed_tokens`, whoever runs the step does" * (
                    sequence.num_computed_tokens == first + count)
                raise CriterionNotMet(f"{before}: {after.name(sequence)} begins at token {first}, and "
                                      f"{sequence.num_computed_tokens} of its tokens are computed{why}")
            if not 0 < count <= len(sequence.tokens) - first:
                raise CriterionNotMet(f"{before}: {after.name(sequence)} computes {count} tokens, of "
                                      f"{len(sequence.tokens) - first} that it has left")


@plan.criterion("every token has a place of its sequence's own, and no other is taken", "property")
def _(subject):
    for before, after, work in cases.planned(subject):
        for sequence, first, count in work:
            got, want = len(sequence.block_table), -(-(first + count) // before.blocks.block_size)
            if got != want and sequence in after.running:
                raise CriterionNotMet(f"{before}: {after.name(sequence)} computes tokens {first} to "
                                      f"{first + count - 1} and has {got} blocks, want {want}: as many as it "
                                      "lacks for this step's tokens")
        held = [block for each in (*after.running, *after.waiting) for block in each.block_table]
        free, n = after.blocks.free_blocks, len(after.blocks.ref_counts)
        if len(set(held)) < len(held) or set(held) & set(free):
            raise CriterionNotMet(f"{before}: afterwards a block is in two tables, or in one and free: given "
                                  "back and not taken out of the table?")
        if len(held) + len(free) < n:
            raise CriterionNotMet(f"{before}: afterwards {len(held)} blocks are in tables and {len(free)} "
                                  f"free, of {n}: who is sent away gives back all of its table")


@plan.criterion("running ones first, then who waits longest", "property")
def _(subject):
    for before, after, work in cases.planned(subject):
        ran, queue = ([before.names[each] for each in who] for who in (before.running, before.waiting))
        order = [after.names[sequence] for sequence, *_ in work]
        if order != sorted(order, key=lambda who: ran.index(who) if who in ran else len(ran)):
            raise CriterionNotMet(f"{before}: the plan has {order}, in this order: those who run come first, "
                                  "in theirs")
        runs, waits = ([after.names[each] for each in who] for who in (after.running, after.waiting))
        gone = [who for who in ran if who in waits]
        if gone and not before.sent_away:
            raise CriterionNotMet(f"{before}: {gone} sent away, and all that run have room: nobody who waits "
                                  "sends anybody away")
        new = [who for who in order if who not in ran]
        if new != queue[:len(new)]:
            raise CriterionNotMet(f"{before}: {new} come in, want the first {len(new)} of {queue}: nobody "
                                  "overtakes, even one that would fit")
        if not before.sent_away and (runs, waits) != ([*ran, *new], queue[len(new):]):
            raise CriterionNotMet(f"{before}: afterwards {runs} run and {waits} wait, want {[*ran, *new]} "
                                  f"and {queue[len(new):]}: who comes in leaves the front of `waiting` for "
                                  "the end of `running`")


@plan.criterion("nobody comes in where somebody was sent away", "property")
def _(subject):
    for before, after, work in _decoding(subject):
        had = {before.names[each]: each.num_computed_tokens for each in before.running}
        came = [after.names[each] for each, first, _ in work if first < had.get(after.names[each], 1)]
        if before.sent_away and came:
            raise CriterionNotMet(f"{before}: for want of room {before.sent_away} must go, and {came} come "
                                  "in, in one step: they would take what it gave")


@plan.criterion("where blocks run out, the last that came yields", "property")
def _(subject):
    for before, after, _ in _decoding(subject):
        ran, queue = {before.names[each] for each in before.running}, [*map(after.names.get, after.waiting)]
        gone = [who for who in queue if who in ran]
        if sorted(gone) != sorted(before.sent_away):
            raise CriterionNotMet(f"{before}: {gone or 'nobody'} sent away, want "
                                  f"{before.sent_away or 'nobody'}: the last of the running, one after "
                                  "another, until there is room for this one")
        for each in after.waiting:
            if after.names[each] in gone and (each.num_computed_tokens or each.block_table):
                raise CriterionNotMet(f"{before}: {after.name(each)} waits and has "
                                      f"{each.num_computed_tokens} tokens computed and block table "
                                      f"{each.block_table}: its blocks are somebody else's now, so 0 and []")
        if gone and queue[:len(gone)] != sorted(gone):
            raise CriterionNotMet(f"{before}: {gone} are sent away and the queue is {queue}: they came "
                                  "before all that wait")


@plan.criterion("the real scheduler's plan", "parity")
def _(subject):
    for before, after, work in cases.planned(subject):
        got = [(after.names[sequence], first, count) for sequence, first, count in work]
        if got != before.want:
            raise CriterionNotMet(f"{before}: plans {got}, want {before.want}, as (who, first token, how "
                                  f"many): {_cause(got, before)}")


@plan.criterion("a trace ends, in as many steps as the real one's", "resource")
def _(subject):
    for seed, (n, size, budget) in enumerate(cases.POOLS):
        got, want = cases.whole(subject, n, size, budget, seed)
        left = len(got.running) + len(got.waiting)
        if left or got.steps != want.steps:
            what = (f"{left} are left after {got.now} steps, the real one takes {want.steps}: is everybody "
                    f"let in again?" if left else f"all are done after {got.now} steps; it must be "
                    f"{want.steps}, the real one's")
            raise CriterionNotMet(f"12 requests, {n} blocks of {size}, budget {budget}: {what}")


def _decoding(subject):
    """The moments at which each running one has a token to compute: how large a chunk is, is not asked."""
    for before, after, work in cases.planned(subject):
        if all(len(each.tokens) - each.num_computed_tokens == 1 for each in before.running):
            yield before, after, work


def _queues(before, after, work):
    """Everybody is still somewhere, once; who is planned runs."""
    here = sorted(after.names[each] for each in (*after.running, *after.waiting))
    if here != sorted(before.names[each] for each in (*before.running, *before.waiting)):
        raise CriterionNotMet(f"{before}: afterwards {here} run or wait: each is in one of the two queues, "
                              "once")
    for sequence, *_ in work:
        if sequence not in after.running and sequence.block_table:
            ran = after.names[sequence] in [before.names[each] for each in before.running]
            raise CriterionNotMet(f"{before}: {after.name(sequence)} is planned and waits: "
                                  + ("it was sent away in this step, so plan it no more" if ran else
                                     "move it from waiting to running"))


def _cause(got, before):
    total, most = sum(count for *_, count in got), sum(count for *_, count in before.want)
    if total < most:
        return "tokens and budget are left: a prompt goes in as large a chunk as the budget allows"
    return "a chunk is all that is left of the budget, or of the tokens"
