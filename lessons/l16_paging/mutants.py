"""Known-wrong pools and scheduling steps: each has one mistake that a check must find."""
from functools import partial
from math import ceil

from lessons.l16_paging import checks as check
from lessons.l16_paging import wrong_block_pools as wrong
from nanoinfra.lab.mutants import Mutant


def missing(sequence, count, blocks):
    return ceil((sequence.num_computed_tokens + count) / blocks.block_size) - len(sequence.block_table)


def full(*asked):
    return missing(*asked) > len(asked[-1].free_blocks)


def start(sequence, count, blocks, lacks=missing):
    few = min(lacks(sequence, count, blocks), len(blocks.free_blocks))
    sequence.block_table += [blocks.allocate() for _ in range(few)]
    return sequence, sequence.num_computed_tokens, count


def step(running, waiting, blocks, budget, victim=lambda running, sequence: running[-1], start=start,
         away=lambda waiting, last: waiting.appendleft(last), spend=lambda count: count,
         forget=lambda last: last.block_table.clear() or setattr(last, "num_computed_tokens", 0),
         share=lambda budget, count: min(budget, count), choose=lambda waiting: 0,
         let_in=lambda before, running: len(running) >= before,
         still=lambda running, sequence: sequence in running, take_out=list.remove,
         newest_first=False, new_first=False, patient=True):
    """The right step, with a place for each slip."""
    work, before = [], list(running)

    def admit(budget):
        while budget and waiting and let_in(len(before), running):
            i = choose(waiting)
            count = share(budget, len(waiting[i].tokens))
            if missing(waiting[i], count, blocks) > len(blocks.free_blocks):
                break
            running.append(waiting[i])
            del waiting[i]
            work.append(start(running[-1], count, blocks))
            budget -= spend(count)
        return budget
    budget = admit(budget) if new_first else budget
    for sequence in reversed(before) if newest_first else before:
        count = share(budget, len(sequence.tokens) - sequence.num_computed_tokens)
        while patient and count and still(running, sequence) and full(sequence, count, blocks):
            last = victim(running, sequence)
            take_out(running, last)
            blocks.free(last.block_table)
            forget(last)
            away(waiting, last)
        if count > 0 and still(running, sequence) and not full(sequence, count, blocks):
            work.append(start(sequence, count, blocks))
            budget -= spend(count)
    admit(budget)
    return work


def begins_anew(sequence, count, blocks):
    return sequence, 0, start(sequence, count, blocks)[2]


def takes_one_more(sequence, count, blocks):
    return start(sequence, count, blocks, lambda *asked: missing(*asked) + 1)


def takes_room_for_an_answer(sequence, count, blocks):
    return start(sequence, count, blocks, lambda each, _, blocks: missing(each, len(each.tokens) + 9, blocks))


def takes_one_too_few(sequence, count, blocks):
    return start(sequence, count, blocks, lambda *asked: missing(*asked) - 1)


def adds_to_computed(sequence, count, blocks):
    entry = start(sequence, count, blocks)
    sequence.num_computed_tokens += count
    return entry


def lets_the_first_that_fits_in(running, waiting, blocks, budget):
    def fits(waiting):
        return next((i for i, each in enumerate(waiting)
                     if missing(each, min(budget, len(each.tokens)), blocks) <= len(blocks.free_blocks)), 0)
    return step(running, waiting, blocks, budget, choose=fits)


def returns_nothing(*args):
    step(*args)


def forgets_to_let_in(running, waiting, blocks, budget):
    return step(running, waiting, blocks, budget, let_in=lambda *_: False)


def leaves_them_in_the_queue(running, waiting, blocks, budget):
    queue = list(waiting)
    work = step(running, waiting, blocks, budget)
    came = [each for each in queue if each in running]
    for each in came:
        running.remove(each)
    waiting.extendleft(reversed(came))
    return work


def lets_nobody_in_again(running, waiting, blocks, budget):
    def new(waiting):
        return [i for i, each in enumerate(waiting) if not getattr(each, "came", False)]
    work = step(running, waiting, blocks, budget, choose=lambda waiting: new(waiting)[0],
                let_in=lambda before, running: new(waiting) and len(running) >= before)
    for each in running:
        each.came = True
    return work


def lets_in_again_a_step_late(running, waiting, blocks, budget):
    late = bool(waiting) and getattr(waiting[0], "came", False) and not getattr(waiting[0], "late", False)
    if late:
        waiting[0].late = True
    work = step(running, waiting, blocks, budget,
                let_in=lambda before, running: not late and len(running) >= before)
    for each in running:
        each.came = True
    return work


def asks_nobody_for_room(running, waiting, blocks, budget):
    work = []
    for sequence in running:
        count = min(budget, len(sequence.tokens) - sequence.num_computed_tokens)
        sequence.block_table += [blocks.allocate() for _ in range(missing(sequence, count, blocks))]
        work.append((sequence, sequence.num_computed_tokens, count))
        budget -= count
    return work


def sends_others_away_for_who_waits(running, waiting, blocks, budget):
    ran = len(running)
    work = step(running, waiting, blocks, budget)
    if waiting and len(running) == ran > 1 and sum(count for *_, count in work) < budget:
        new, last = waiting.popleft(), running.pop()
        blocks.free(last.block_table)
        last.block_table, last.num_computed_tokens = [], 0
        running.append(new)
        waiting.appendleft(last)
    return work


def puts_new_ones_at_the_front(running, waiting, blocks, budget):
    before = list(running)
    work = step(running, waiting, blocks, budget)
    running.sort(key=lambda each: each in before)
    return work


spends_nothing = partial(step, spend=lambda count: 0)
takes_one_token_each = partial(step, share=lambda budget, count: min(budget, count, 1))
waits_until_a_prompt_fits_whole = partial(step, share=lambda budget, count: count if count <= budget else 0)
lets_new_ones_in_first = partial(step, new_first=True)
lets_the_last_in_first = partial(step, choose=lambda waiting: len(waiting) - 1)
begins_with_the_newest = partial(step, newest_first=True)
sends_the_first_away = partial(step, victim=lambda running, sequence: running[0])
sends_itself_away = partial(step, victim=lambda running, sequence: sequence)
puts_who_was_sent_away_last = partial(step, away=lambda waiting, last: waiting.append(last))
keeps_what_is_computed = partial(step, forget=lambda last: last.block_table.clear())
keeps_its_table = partial(step, forget=lambda last: setattr(last, "num_computed_tokens", 0))
lets_somebody_in_at_once = partial(step, let_in=lambda *_: True)
begins_at_0 = partial(step, start=begins_anew)
takes_a_block_too_many = partial(step, start=takes_one_more)
reserves_the_whole_answer = partial(step, start=takes_room_for_an_answer)
takes_a_block_too_few = partial(step, start=takes_one_too_few)
counts_for_itself = partial(step, start=adds_to_computed)
takes_nobody_out = partial(step, take_out=lambda *_: None)
goes_on_with_who_was_sent_away = partial(step, still=lambda *_: True)
skips_who_finds_no_room = partial(step, patient=False)

TAKEN, FREED, OWN, NOTHING, TWICE, ORDER = (criterion.name for criterion in check.Pool.criteria)
BUDGET, PLACES, FIRST, ALONE, LAST, REAL, TRACE = (criterion.name for criterion in check.plan.criteria)
POOLS = {wrong.LeavesItAmongTheFree: TAKEN, wrong.FreesWhatOthersRead: FREED, wrong.CountsNoHolder: TAKEN,
         wrong.CountsOnTop: FREED, wrong.ForgetsAllHolders: FREED, wrong.NeverFrees: FREED,
         wrong.GivesBackTheFirstAlone: FREED, wrong.WritesWhereOthersRead: OWN, wrong.CopiesAlways: OWN,
         wrong.KeepsHoldingTheOld: OWN, wrong.CopiesTheWrongWay: OWN, wrong.CopiesTheWholeTable: OWN,
         wrong.GivesBackBeforeItTakes: NOTHING, wrong.TakesBackTwice: TWICE, wrong.EmptiesTheTable: TWICE,
         wrong.SaysValueErrorWhereNoneIsFree: TAKEN, wrong.SharesForTwo: ORDER}
PLANS = {spends_nothing: BUDGET, sends_the_first_away: LAST, begins_at_0: BUDGET,
         leaves_them_in_the_queue: BUDGET, returns_nothing: BUDGET, takes_a_block_too_few: PLACES,
         keeps_its_table: PLACES,
         lets_new_ones_in_first: FIRST, lets_the_last_in_first: FIRST, begins_with_the_newest: FIRST,
         lets_the_first_that_fits_in: FIRST, sends_itself_away: LAST, skips_who_finds_no_room: LAST,
         puts_who_was_sent_away_last: LAST, keeps_what_is_computed: LAST, lets_somebody_in_at_once: ALONE,
         takes_one_token_each: REAL, waits_until_a_prompt_fits_whole: BUDGET, forgets_to_let_in: REAL,
         takes_a_block_too_many: PLACES, reserves_the_whole_answer: PLACES, lets_nobody_in_again: TRACE,
         lets_in_again_a_step_late: TRACE, counts_for_itself: BUDGET, takes_nobody_out: BUDGET,
         goes_on_with_who_was_sent_away: BUDGET,
         asks_nobody_for_room: BUDGET, sends_others_away_for_who_waits: FIRST,
         puts_new_ones_at_the_front: FIRST}


def _words(name):
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip().replace("_", " ")


NAMES = {id(variant): _words(name) for name, variant in [*vars(wrong).items(), *globals().items()]}
MUTANTS = [Mutant(NAMES[id(variant)], judge, variant, rejected_by)
           for judge, variants in ((check.Pool, POOLS), (check.plan, PLANS))
           for variant, rejected_by in variants.items()]
