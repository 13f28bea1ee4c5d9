"""What is too large is refused before any work; what is as large as may be is answered."""
import json
import tracemalloc

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import MAX_ERROR_MESSAGE_CHARS, APIError
from nanoinfra.serve.engine.detokenizer import StopStringDetokenizer
from nanoinfra.serve.engine.request_and_output import Logprob, RequestOutput
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai.choice_accumulator import FlatLogprobs
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from nanoinfra.serve.server.openai.completion_responses import (
    ChatCompletionResponse,
    CompletionResponse,
    encode_json,
)
from tests.serve.fake import TEMPLATE, text
from tests.serve.letters import letters

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CONTEXT, LONGEST = 64, len("<end>")
HI = {"role": "user", "content": "hi"}


class Counting:
    """A backend that counts the characters it has tokenized."""

    def __init__(self, backend):
        self.backend, self.chars = backend, 0

    def encode_batch(self, texts, add_special_tokens):
        self.chars += sum(map(len, texts))
        return self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)

    def __getattr__(self, name):
        return getattr(self.backend, name)


def ready(context=CONTEXT):
    tokenizer = text()
    return EngineReady({"context": context, "vocab": 257},
                       type(tokenizer)(Counting(tokenizer.backend_tokenizer)),
                       TEMPLATE)


def asked(kind, model=None, **body):
    return build_engine_requests(parse_request_body(kind, json.dumps(body).encode()), "name",
                                 model or ready())


LARGE = {"n": 64, "max_tokens": 16}
SCORED = {"n": 64, "max_tokens": 1, "logprobs": 63, "echo": True}
LIMITS = {                                   # name: (endpoint, what just fits, what does not, why)
    "stop strings": (CompletionRequest, {"prompt": "a", "stop": ["a" * 512, "b" * 512]},
                     {"prompt": "a", "stop": ["a" * 512, "b" * 513]}, "1025 characters"),
    "their number": (CompletionRequest, {"prompt": "a", "stop": ["a"] * 64},
                     {"prompt": "a", "stop": ["a"] * 65}, "64"),
    "biases": (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(range(257), 1)},
               {"prompt": "a", "logit_bias": dict.fromkeys(range(1025), 1)}, "1025 tokens"),
    "prompts": (CompletionRequest, {"prompt": ["a"] * 1024, "max_tokens": 1},
                {"prompt": ["a"] * 1025, "max_tokens": 1}, "1025 prompts"),
    "choices": (CompletionRequest, {"prompt": ["a"] * 16, "n": 64, "max_tokens": 1},
                {"prompt": ["a"] * 17, "n": 64, "max_tokens": 1}, "1088 choices"),
    "tokens of all prompts": (CompletionRequest, {"prompt": [[7] * 32] * 128, "max_tokens": 1},
                              {"prompt": [[7] * 33] * 125, "max_tokens": 1}, "64 contexts of 64, 4096"),
    "tokens said": (CompletionRequest, {"prompt": ["a"] * 128, "max_tokens": 32},
                    {"prompt": ["a"] * 128, "max_tokens": 33}, "4224 tokens; ask for at most 64 contexts"),
    "tokens echoed": (CompletionRequest, {"prompt": ["a"] * 128, "max_tokens": 31, "echo": True},
                      {"prompt": ["a"] * 128, "max_tokens": 32, "echo": True}, "4224 tokens"),
    "log-probabilities": (CompletionRequest, {"prompt": "a", **LARGE, "logprobs": 63},
                          {"prompt": "a", **LARGE, "logprobs": 64}, "66560 log-probabilities"),
    "those of prompts": (CompletionRequest, {"prompt": [7] * 15, **SCORED}, {"prompt": [7] * 16, **SCORED},
                         "65536"),
    "those of a chat": (ChatCompletionRequest,
                        {"messages": [HI], **LARGE, "logprobs": True, "top_logprobs": 63},
                        {"messages": [HI], **LARGE, "logprobs": True, "top_logprobs": 64}, "66560 log-prob"),
    "choices of a chat": (ChatCompletionRequest, {"messages": [HI], "n": 1000}, {"messages": [HI], "n": 1025},
                          "1025 choices"),
    "calls": (ChatCompletionRequest, {"messages": [{**HI, "tool_calls": [1] * 128}]},
              {"messages": [{**HI, "tool_calls": [1] * 129}]}, "128 items"),
    "messages": (ChatCompletionRequest, {"messages": [HI]}, {"messages": [HI] * 4097}, "4096 items")}


@pytest.mark.parametrize("kind, fits, does_not, says", LIMITS.values(), ids=LIMITS.keys())
def test_a_limit_is_where_it_is_said_to_be(kind, fits, does_not, says):
    assert asked(kind, **fits)
    with pytest.raises(APIError, match=says) as refused:
        asked(kind, **does_not)
    assert refused.value.status_code == 400


def test_a_text_that_no_context_spells_is_not_tokenized():
    model, longest = ready(), CONTEXT * LONGEST
    for kind, body in ((CompletionRequest, {"prompt": "a" * (longest + 1)}),
                       (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a" * longest}]})):
        with pytest.raises(APIError, match=f"context of {CONTEXT} tokens of at most {LONGEST} characters"):
            asked(kind, model, **body)
    assert model.tokenizer.backend_tokenizer.chars == 0
    assert asked(CompletionRequest, model, prompt="<end>" * (CONTEXT - 1),
                 max_tokens=1)[0].prompt_token_ids == [256] * 63


def test_nothing_is_rendered_that_is_too_long():
    def render(*_):
        raise AssertionError("rendered")
    question = parse_request_body(ChatCompletionRequest, json.dumps({"messages": [HI] * 80}).encode())
    with pytest.raises(APIError, match="cannot fit"):
        build_engine_requests(question, "name", ready(), render)


def test_a_long_text_is_given_up_with_its_first_piece_that_is_too_many_tokens(monkeypatch):
    monkeypatch.setattr(request_limits, "_TOKENIZE_CHUNK_CHARS", 200)
    model = ready()
    with pytest.raises(APIError, match="first 200 characters of the prompt are 200 tokens"):
        asked(CompletionRequest, model, prompt="7" * 300)
    assert model.tokenizer.backend_tokenizer.chars == 200
    fits = "<end>" * 60                      # 300 characters, cut within a token
    assert asked(CompletionRequest, ready(), prompt=fits, max_tokens=1)[0].prompt_token_ids == [256] * 60


def test_a_text_that_the_tokenizer_does_not_take_is_refused():
    words = Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "long enough": 1}, unk_token="nowhere")))
    with pytest.raises(APIError, match="tokenizer does not take this text") as refused:
        asked(CompletionRequest, EngineReady(ready().info, words), prompt="b")
    assert refused.value.status_code == 400


def test_prompts_are_given_up_where_they_are_too_many_tokens():
    model = ready(context=128)
    with pytest.raises(APIError, match="8200 tokens in one request"):
        asked(CompletionRequest, model, prompt=["a" * 100] * 1024, max_tokens=1)
    assert model.tokenizer.backend_tokenizer.chars == 8200


def test_a_chat_that_leaves_the_length_open_gets_what_may_be_asked():
    request, = asked(ChatCompletionRequest, ready(context=8192), messages=[HI], logprobs=True,
                     top_logprobs=20)
    assert request.max_tokens == 65536 // 21
    request, = asked(ChatCompletionRequest, ready(context=8192), messages=[HI], logprobs=True, top_logprobs=5)
    assert request.max_tokens == 8192 - len(request.prompt_token_ids)


def test_a_full_context_can_always_be_scored():
    context = 100_000
    body = {"prompt": [7] * (context - 1), "max_tokens": 1, "logprobs": 1, "echo": True}
    assert len(asked(CompletionRequest, ready(context), **body)[0].prompt_token_ids) == context - 1
    largest = json.dumps({"prompt": [12345] * context}, separators=(",", ":"))
    assert request_limits.max_body_bytes(context) >= len(largest)


def test_a_prompt_that_is_scored_counts_though_nobody_asked_for_log_probabilities():
    body = {"prompt": [7] * 2048, "max_tokens": 0, "echo": True}
    assert asked(CompletionRequest, ready(8192), **body, n=32)[0].prompt_logprobs
    with pytest.raises(APIError, match="67584 log-probabilities"):
        asked(CompletionRequest, ready(8192), **body, n=33)


def test_an_echo_is_no_larger_than_a_body():
    body = {"prompt": [[256] * 60, "<end>" * 60], "add_special_tokens": False, "echo": True, "max_tokens": 1}
    model, most = ready(), request_limits.MAX_BODY_BYTES

    def answer(n, prompt):
        question = parse_request_body(CompletionRequest,
                                      json.dumps({**body, "n": n, "prompt": prompt}).encode())
        requests = build_engine_requests(question, "name", model)
        return CompletionResponse(question, "name", "model", requests, model.tokenizer)
    assert answer(8, ["a" * 60]).echoed_prompts == ["a" * 60]
    with pytest.raises(APIError, match=f"{most // 4 + 1} characters 4 times"):
        request_limits.check_echo_size(most // 4 + 1, 4)
    request_limits.check_echo_size(most // 4, 4)


def test_what_nobody_knows_is_not_kept():
    question = parse_request_body(ChatCompletionRequest,
                                  json.dumps({"messages": [{**HI, "x": [1]}], "y": {"z": 1},
                                              "stream_options": {"w": 1}}).encode())
    assert not question.model_extra and not question.stream_options.model_extra
    assert not question.messages[0].model_extra and "z" not in repr(question)


def test_templates_get_names_and_calls():
    seen, tool = [], {"role": "tool", "tool_calls": [{"id": 1}]}
    messages = [{**HI, "name": "me", "x": 1}, {**tool, "content": None}]
    question = parse_request_body(ChatCompletionRequest, json.dumps({"messages": messages}).encode())
    build_engine_requests(question, "name", ready(),
                          lambda template, messages, *_: seen.extend(messages) or "a")
    assert seen == [{**HI, "name": "me"}, {**tool, "content": ""}]


def test_a_reason_is_short_whatever_was_sent():
    long = "m" * 100_000
    for body in ({"prompt": "a", "logit_bias": {long: 1}}, {"prompt": "a", "documents": long},
                 {"prompt": [int("7" * 4000)]}, {"prompt": [1, long]}):
        with pytest.raises(APIError) as refused:
            asked(CompletionRequest, **body)
        assert len(json.dumps(refused.value.error_body())) < 2 * MAX_ERROR_MESSAGE_CHARS + 200


@pytest.mark.parametrize("name", [
    "n", "top_k", "logprobs", "max_tokens", "seed", "temperature", "top_p", "min_p", "presence_penalty",
    "repetition_penalty", "best_of", "min_tokens", "prompt"])
@pytest.mark.parametrize("digits", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "-1e400"])
def test_a_number_of_400_digits_is_a_400(name, digits):
    for kind, body in ((CompletionRequest, {"prompt": "a"}), (ChatCompletionRequest, {"messages": [HI]})):
        body = json.dumps({**body, "logprobs": kind is ChatCompletionRequest or 1,
                           name: "here"}).replace('"here"', digits)
        if kind is CompletionRequest or name != "prompt":
            with pytest.raises(APIError) as refused:
                build_engine_requests(parse_request_body(kind, body.encode()), "name", ready())
            assert refused.value.status_code == 400


LOGPROBS = st.lists(st.builds(Logprob, st.integers(0, 2 ** 31 - 1), st.floats(allow_nan=False), st.lists(
    st.tuples(st.integers(0, 2 ** 31 - 1), st.floats(allow_nan=False)), max_size=3)))


@given(st.lists(LOGPROBS, max_size=3))
@few
def test_flat_log_probabilities_are_what_they_were(several):
    flat = FlatLogprobs()
    for each in several:
        flat.extend(each)
    want = [each for logprobs in several for each in logprobs]
    assert list(flat) == want and len(flat) == len(want)


def test_an_answer_that_is_kept_takes_12_bytes_a_log_probability():
    question = parse_request_body(ChatCompletionRequest,
                                  json.dumps({"messages": [HI], "logprobs": True,
                                              "top_logprobs": 100}).encode())
    answer = ChatCompletionResponse(question, "name", "model",
                                    build_engine_requests(question, "name", ready(8192)), text())
    tracemalloc.start()
    for _ in range(300):
        said = Logprob(7, -0.25, [(1000 + i, -0.25 - i) for i in range(100)])
        answer.add_output(RequestOutput("name", 0, "a", [7], [said]))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 300 * 101 * 12 * 1.3 + 20_000
    assert len(answer.build_response_object()["choices"][0]["logprobs"]["content"]) == 300


FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.none() | st.booleans() | st.integers() | FINITE | st.text()


@given(st.recursive(VALUES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@few
def test_json_that_is_written_piece_by_piece_is_the_same(data):
    assert json.loads(encode_json({"data": data})) == {"data": data}


class Counted(str):
    """A stop string that counts how often a text is held against it."""
    looks = 0

    def startswith(self, *given):
        self.looks += 1
        return super().startswith(*given)


def test_a_long_stop_string_costs_no_more_than_the_text_that_waits_for_it():
    stop = Counted("a" * 1000)
    writer = StopStringDetokenizer(letters(first=0, n=128), (stop,))
    for letter in "bcd" * 20:
        assert writer.push_token(ord(letter)) == letter
    assert stop.looks <= 60
