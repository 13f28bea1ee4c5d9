import pytest

from lessons.l02_ring_all_reduce import checks as check
from nanoinfra.distributed.comm import ring_shift


def scatter(x, axis, index=lambda rank, step, n: (rank - 1 - step) % n, keep=True, add=lambda a, b: a + b):
    """Reduce-scatter with a student's slips."""
    n, rank = axis.size, axis.rank
    partial = x[rank - 1]
    for step in range(1, n):
        came = ring_shift(partial, axis)
        mine = x[index(rank, step, n)]
        mine.copy_(add(came, mine))                                # into x, not into partial
        partial = mine if keep else came
    return partial


def gather(x, axis, own=True, rounds=lambda n: n - 1, shift=0, add=False):
    """All-reduce with a student's slips in the second phase."""
    n, rank = axis.size, axis.rank
    parts = x.view(n, -1)
    chunk = scatter(parts.clone(), axis)
    if own:
        parts[rank] = chunk
    for step in range(1, 1 + rounds(n)):
        chunk = ring_shift(chunk, axis)
        row = (rank - step + shift) % n
        parts[row] = parts[row] + chunk if add else chunk
    return x


@pytest.mark.parametrize("slip, said", [
    ({"keep": False}, "ring of 4, rank 0, chunk 0: holds the part of rank 1; ranks 0, 2, 3's are missing: "
                      "what you return, or send on, lacks what you added?"),
    ({"add": lambda came, mine: came - mine}, "ranks 0 (-1 x), 1, 2 (-1 x), 3 (-1 x): a - for a +?"),
    ({"add": lambda came, mine: mine}, "holds the part of rank 0; ranks 1, 2, 3's are missing"),
    ({"index": lambda rank, step, n: rank}, "parts of different chunks were added: the index?"),
    ({"index": lambda rank, step, n: rank + step}, "ring of 4: rank "),
    ({"add": lambda came, mine: undefined}, "import inside the exercise cell"),  # noqa: F821
])
def test_a_wrong_reduce_scatter_is_told_whose_parts_it_holds(slip, said):
    text = check.ring_reduce_scatter.report(lambda x, axis: scatter(x, axis, **slip)).first_failure.text
    assert said in text


def test_an_untouched_partial_is_recognised():
    text = check.ring_reduce_scatter.report(lambda x, axis: x[axis.rank - 1]).first_failure.text
    assert text == ("ring of 4, rank 0, chunk 0: holds chunk 3 of rank 0: this is what `partial` was at the "
                    "start. Is the sum kept in it?")


@pytest.mark.parametrize("slip, said", [
    ({"rounds": lambda n: 0}, "rank 0, chunk 1: holds the part of rank 0; ranks 1, 2, 3's are missing: still "
                              "your own numbers: was this chunk ever gathered?"),
    ({"own": False}, "rank 0, chunk 0: holds the part of rank 0; ranks 1, 2, 3's are missing: still your own "
                     "numbers: was the finished chunk written into its row?"),
    ({"shift": 1}, "rank 0, chunk 0: holds chunk 3 of ranks 0, 1, 2, 3: this is chunk 3's sum: written into "
                   "another row?"),
    ({"add": True}, "rank 0, chunk 1: holds the parts of ranks 0 (2 x), 1, 2, 3: added where it should be"),
])
def test_a_wrong_all_gather_is_told_what_the_chunk_is(slip, said):
    text = check.ring_all_reduce.report(lambda x, axis: gather(x, axis, **slip)).first_failure.text
    assert f"ring of 4, {said}" in text


def test_a_result_that_is_not_in_place_is_refused():
    failure = check.ring_all_reduce.report(lambda x, axis: gather(x.clone(), axis)).first_failure
    assert "`x` was not changed: in place, please" in failure.text


@pytest.mark.parametrize("wrong, said", [(lambda x, axis: None, "NoneType"), (lambda x, axis: x[:1], "shape"),
                                         (lambda x, axis: x.float(), "float32"),
                                         (lambda x, axis: x.fill_(0.5), "differs at")])
def test_what_cannot_be_taken_apart_still_says_which_ring(wrong, said):
    text = check.ring_all_reduce.report(wrong).first_failure.text
    assert text.startswith("ring of 4, rank 0: `x`") and said in text
