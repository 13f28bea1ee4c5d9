"""What ends a continuation: tokens and texts that are asked for, and what must come before they may."""
import pytest
import torch

from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.engine import Engine
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams
from nanoinfra.serve.engine.sampler import mask_out_tokens
from tests.serve.letters import letters
from tests.serve.test_engine import GREEDY, alone, prompt, tiny

MODEL, TOKENS = tiny(), prompt(5, 5)
WANT = alone(MODEL, TOKENS, 12)


def said(sampling=GREEDY, ends=(), n=12, **more):
    """(tokens, text, why it ended) of one request."""
    engine = Engine(MODEL, letters(ends=ends), num_blocks=10, block_size=4)
    engine.add_request(Request("r", TOKENS, sampling, max_tokens=n, **more))
    events = []
    while engine.has_unfinished_requests:
        events += engine.step()
    tokens = [token for event in events for token in event.token_ids]
    return tokens, "".join(event.text for event in events), events[-1].finish_reason


@torch.no_grad()
def greedy(banned, at_least, n):
    """What the likeliest are, with `banned` left out for the first `at_least`."""
    tokens = list(TOKENS)
    for i in range(n):
        logits = MODEL(torch.tensor([tokens]))[0, -1]
        if i < at_least:
            logits[list(banned)] = -torch.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(TOKENS):]


def test_a_stop_token_ends_and_is_shown_whatever_becomes_of_eos():
    stop = WANT[4]
    first = WANT[:WANT.index(stop) + 1]
    for more in ({}, {"ignore_eos": True}):
        assert said(stop_token_ids=(stop,), **more) == (first, letters().decode(first), "stop")


@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}])
def test_nothing_that_ends_comes_before_so_many_tokens(more):
    ends, stops = {WANT[0]}, (WANT[1], WANT[2])
    want = greedy({*ends, *stops}, 5, 5)
    tokens, _, _ = said(ends=ends, stop_token_ids=stops, min_tokens=5, **more)
    assert tokens[:5] == want and not {*ends, *stops} & {*want} and want != WANT[:5]
    assert said(ends=ends, stop_token_ids=stops, **more)[0] != tokens


def test_what_must_come_is_drawn_too_and_reported_as_the_model_has_it():
    how = SamplingParams(temperature=0.7, seed=3, logit_bias={WANT[0]: 100.0})
    tokens, _, finish = said(how, ends={WANT[0]}, min_tokens=4)
    assert WANT[0] not in tokens[:4] and (tokens[4], finish) == (WANT[0], "stop")
    for n in (1, 5):
        assert len(said(ends=set(range(97)), min_tokens=n - 1)[0]) == n  # there is no other: one of them


def test_a_stop_string_ends_nothing_before_so_many_tokens():
    text = letters().decode(WANT)
    stop = next(text[i] for i in range(5, 12) if text[i] in text[:5])    # comes early, and again
    again = text.index(stop, 5)
    assert said(stop=(stop,), min_tokens=5) == (WANT[:again + 1], text[:again], "stop")
    assert said(stop=(stop,), min_tokens=12) == (WANT, text, "length")


def test_a_stop_string_that_begins_before_and_ends_after_is_not_shown():
    writer = StopStringDetokenizer(letters(first=0, n=128), ("ab", "xy"))
    writer.ignore_stop_strings = True
    shown = "".join(writer.push_token(ord(letter)) for letter in "1ab2xyxya")
    assert shown == "1ab2xyxy" and not writer.stopped and writer.held == "a"
    writer.ignore_stop_strings = False
    assert writer.push_token(ord("b")) == "" and writer.stopped


def test_where_the_pool_is_the_limit_nothing_that_was_held_is_lost():
    text = letters().decode(WANT)
    engine = Engine(MODEL, letters(), num_blocks=2, block_size=4)
    engine.add_request(Request("r", TOKENS, GREEDY, max_tokens=12, stop=(text[2:4] + "no",)))
    shown, finish = "", None
    while engine.has_unfinished_requests:
        for event in engine.step():
            shown, finish = shown + event.text, event.finish_reason
    assert (shown, finish) == (text[:4], "length")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tokens_that_may_not_come_are_the_least_likely(dtype):
    logits = torch.tensor([3.0, 2.0, 1.0], dtype=dtype)
    assert mask_out_tokens(logits, []) is logits
    got = mask_out_tokens(logits, [0, 2])
    assert got.isfinite().all() and got.argmax() == 1 and logits[0] == 3
