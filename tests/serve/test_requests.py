"""What cannot be answered is refused with a reason that can be written, whatever the numbers are."""
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Request, SamplingParams, check_request
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from tests.serve.fake import TEMPLATE, text

CONTEXT, VOCAB, HUGE = 40, 97, 10 ** 400


def refused(**more):
    """Why `check` does not let the request pass; None if it does."""
    try:
        check_request(Request(**{"request_id": "r", "prompt_token_ids": [1, 2, 3]} | more), CONTEXT, VOCAB)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name, more", [
    ("n", {"n": HUGE}), ("n", {"n": -HUGE}), ("logprobs", {"logprobs": HUGE}), ("new", {"max_tokens": HUGE}),
    ("new", {"max_tokens": -HUGE}), ("token", {"prompt_token_ids": [HUGE]}),
    ("token", {"prompt_token_ids": [1, -HUGE]}), ("top_k", {"sampling_params": SamplingParams(top_k=HUGE)}),
    ("seed", {"sampling_params": SamplingParams(seed=HUGE)}),
    ("seed", {"sampling_params": SamplingParams(seed=-2 ** 63 - 1)}),
    ("temperature", {"sampling_params": SamplingParams(HUGE)}),
    ("logit_bias", {"sampling_params": SamplingParams(logit_bias={HUGE: 1.0})}),
    ("logit_bias", {"sampling_params": SamplingParams(logit_bias={1: HUGE})})])
def test_a_number_of_400_digits_is_refused_in_few_words(name, more):
    why = refused(**more)
    assert name in why and len(why) < 200
    assert "10^400" in why or "-9223372036854775809" in why


@pytest.mark.parametrize("digits", [25, 5000])           # Python writes none of more than 4,300
def test_huge_ones_are_shown_by_their_size(digits):
    assert f"n 10^{digits} is out of range; give 1 to 1000" == refused(n=10 ** digits)
    assert f"seed -10^{digits} is out of range" in refused(sampling_params=SamplingParams(seed=-10 ** digits))


@pytest.mark.parametrize("how, says", [
    (SamplingParams(logit_bias={1: math.nan}), "logit_bias nan is out of range; give -100 to 100"),
    (SamplingParams(logit_bias={1: 1.0, 2: -math.inf}), "logit_bias -inf"),
    (SamplingParams(logit_bias={1: 100.5}), "logit_bias 100.5"),
    (SamplingParams(temperature=math.inf), "temperature inf"), (SamplingParams(top_p=-0.0),
                                                                "top_p -0 is out of range"),
    (SamplingParams(repetition_penalty=0.0), "repetition_penalty 0"), (SamplingParams(presence_penalty=2.1),
                                                                       "presence_penalty 2.1"),
    (SamplingParams(frequency_penalty=-math.inf), "frequency_penalty -inf"), (SamplingParams(min_p=math.nan),
                                                                              "min_p nan")])
def test_what_would_make_logits_infinite_is_refused(how, says):
    assert says in refused(sampling_params=how)


def test_an_empty_stop_string_is_refused_and_the_ends_of_all_ranges_are_not():
    assert refused(stop=("a", "")) == "a stop string is empty; leave it out"
    ends = SamplingParams(-0.0, VOCAB, 1e-9, -0.0, -2, 2, 1e-9, {0: -100, VOCAB - 1: 100}, -2 ** 63)
    assert refused(sampling_params=ends) is None
    assert refused(sampling_params=SamplingParams(100, seed=2 ** 63 - 1)) is None


whole = st.integers() | st.sampled_from([HUGE, -HUGE, 2 ** 63, -2 ** 63])
anything = whole | st.floats()
ways = st.builds(SamplingParams, anything, whole, anything, anything, anything, anything, anything,
                 st.dictionaries(whole, anything, max_size=3), st.none() | whole)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(whole, min_size=1, max_size=3), ways, whole, whole, st.none() | whole, st.booleans())
def test_check_raises_nothing_but_value_error(tokens, how, most, n, logprobs, echo):
    refused(prompt_token_ids=tokens, sampling_params=how, max_tokens=most, n=n, logprobs=logprobs,
            prompt_logprobs=echo)


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, '"' + "9" * 400 + '"', "9" * 5000, "1e400",
                                    "-0", "-0.0", "1e-400", "-1", "0.5", "true", '"1e400"'])
@pytest.mark.parametrize("name", [
    "n", "top_k", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "seed", "temperature",
    "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "prompt"])
def test_every_number_in_json_is_taken_or_refused(name, number):
    """By both endpoints, with a status of 400."""
    ready = EngineReady({"context": CONTEXT, "vocab": 257}, text(), TEMPLATE)
    given = {"logit_bias": f'{{{json.dumps(number.strip(chr(34)))}: {number}}}', "prompt": f"[1, {number}]"}
    for kind, asks in ((CompletionRequest, '"prompt": "a"'),
                       (ChatCompletionRequest, '"messages": [{"role": "user"}]')):
        asks = "" if name == "prompt" and kind is CompletionRequest else asks + ", "
        body = f'{{{asks}"{name}": {given.get(name, number)}}}'
        if name == "top_logprobs":
            body = body.replace("{", '{"logprobs": true, ', 1)
        try:
            build_engine_requests(parse_request_body(kind, body.encode()), "r", ready)
        except APIError as why:
            assert why.status_code == 400 and len(str(why)) < 1000
