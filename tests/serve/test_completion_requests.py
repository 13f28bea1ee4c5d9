"""What clients may send, what the engine is asked then, and the shape of what they get; no server."""
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Logprob, RequestOutput, SamplingParams
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from nanoinfra.serve.server.openai.completion_responses import ChatCompletionResponse, CompletionResponse
from nanoinfra.serve.server.openai.request_fields import NOOP_VALUES_OF_UNSUPPORTED_FIELDS
from tests.serve.fake import TEMPLATE, text

READY = EngineReady({"context": 64, "vocab": 257}, text(), TEMPLATE)
HI = [{"role": "user", "content": "hi"}]
UNSUPPORTED = {
    "best_of": 3, "suffix": "x", "response_format": {"type": "json_object"}, "modalities": ["audio"],
    "audio": {}, "use_beam_search": True, "length_penalty": 2, "bad_words": ["x"],
    "parallel_tool_calls": False, "reasoning_effort": "low", "reasoning": {"effort": "low"},
    "verbosity": "low", "moderation": {}, "include_reasoning": False, "thinking_token_budget": 9,
    "repetition_detection": {}, "logits_processors": ["x"], "return_tokens_as_token_ids": True,
    "return_token_ids": True, "priority": 1, "kv_transfer_params": {}, "vllm_xargs": {"a": 1}, "regex": "a",
    "ebnf": "a", "grammar": "a", "json_schema": {}, "n_predict": 4, "max_new_tokens": 4, "typical_p": 0.5,
    "repeat_penalty": 2, "mirostat": 2, "dry_multiplier": 0.8, "xtc_probability": 0.5,
    "allowed_token_ids": [1], "prompt_logprobs": 1, "truncate_prompt_tokens": 4, "guided_json": {},
    "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "a", "structured_outputs": {},
    "continue_final_message": True, "add_generation_prompt": False, "chat_template": "x",
    "chat_template_kwargs": {"a": 1}, "documents": [{}], "skip_special_tokens": False,
    "include_stop_str_in_output": True, "prompt_embeds": "x", "web_search_options": {}}


def ids(said):
    return READY.tokenizer.encode(said)


def asked(kind, **body):
    """The requests that a body becomes."""
    return build_engine_requests(parse_request_body(kind, json.dumps(body).encode()), "name", READY)


@pytest.mark.parametrize("prompt, want", [
    ("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), (ids("ab"), ["ab"]), ([ids("ab"), ids("c")], ["ab", "c"])])
def test_a_prompt_has_four_forms(prompt, want):
    requests = asked(CompletionRequest, prompt=prompt, n=3, max_tokens=2)
    got = [(each.prompt_token_ids, each.n, each.max_tokens) for each in requests]
    assert got == [(ids(w), 3, 2) for w in want]
    assert len({each.request_id for each in requests}) == len(want)


def test_every_parameter_arrives():
    request, = asked(CompletionRequest, prompt="ab", max_tokens=None, temperature=0.5, top_p=0.9, top_k=-1,
                     min_p=0.1, presence_penalty=0.2, frequency_penalty=-0.3, repetition_penalty=1.1, seed=-7,
                     logit_bias={"5": 2, "6": -100}, stop="x", ignore_eos=True, logprobs=3, echo=True,
                     cache_salt="mine", user="me", never_heard_of_it=[1])
    assert request.sampling_params == SamplingParams(0.5, 0, 0.9, 0.1, 0.2, -0.3, 1.1, {5: 2.0, 6: -100.0},
                                                     -7)
    assert (request.max_tokens, request.stop, request.logprobs) == (16, ("x",), 3)
    assert request.ignore_eos and request.prompt_logprobs and request.cache_salt == "mine"


def test_null_is_the_default():
    names = [*ChatCompletionRequest.model_fields, *NOOP_VALUES_OF_UNSUPPORTED_FIELDS]
    assert asked(ChatCompletionRequest,
                 **{**dict.fromkeys(names), "messages": HI}) == asked(ChatCompletionRequest, messages=HI)


def test_a_chat_is_rendered_and_may_fill_the_context():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request, = asked(ChatCompletionRequest,
                     messages=[{"role": "system", "content": "be"}, {"role": "user", "content": parts},
                               {"role": "assistant", "content": None}], logprobs=True)
    assert request.prompt_token_ids == ids("s:be\nu:a\nb\na:\n")
    assert request.max_tokens == 64 - len(request.prompt_token_ids) and request.logprobs == 0
    assert asked(ChatCompletionRequest, messages=HI, logprobs=True, top_logprobs=4)[0].logprobs == 4
    assert asked(ChatCompletionRequest, messages=HI, max_tokens=3, max_completion_tokens=4)[0].max_tokens == 4
    assert asked(ChatCompletionRequest, messages=HI, max_tokens=3)[0].max_tokens == 3


REFUSED = {
    "no prompt": (CompletionRequest, {}, "prompt"),
    "an empty prompt": (CompletionRequest, {"prompt": ""}, "no tokens"),
    "no prompts": (CompletionRequest, {"prompt": []}, "prompt"),
    "a prompt of both kinds": (CompletionRequest, {"prompt": [1, "a"]}, "token ids"),
    "true for a token": (CompletionRequest, {"prompt": [True]}, "token ids"),
    "a token that is none": (CompletionRequest, {"prompt": [257]}, "vocabulary of 257"),
    "a negative token": (CompletionRequest, {"prompt": [-1]}, "vocabulary of 257"),
    "a prompt too long": (CompletionRequest, {"prompt": "a" * 64, "max_tokens": 1}, "context of 64"),
    "too many new tokens": (CompletionRequest, {"prompt": "a", "max_tokens": 64}, "at most 63"),
    "less than no new tokens": (CompletionRequest, {"prompt": "a", "max_tokens": -1}, "at least 0"),
    "more tokens at least than at most": (CompletionRequest, {"prompt": "a", "min_tokens": 17},
                                          "give 0 to 16"),
    "a stop token that is none": (CompletionRequest, {"prompt": "a", "stop_token_ids": [257]}, "0 to 256"),
    "a turn to go on with": (ChatCompletionRequest,
                             {"messages": [*HI, {"role": "assistant", "prefix": True}]}, "prefix"),
    "n of 0": (CompletionRequest, {"prompt": "a", "n": 0}, "n 0"),
    "a temperature below 0": (CompletionRequest, {"prompt": "a", "temperature": -1}, "temperature"),
    "a temperature that is no number": (CompletionRequest, {"prompt": "a", "temperature": math.nan},
                                        "temperature"),
    "top_p of 0": (CompletionRequest, {"prompt": "a", "top_p": 0}, "top_p"),
    "an empty stop string": (CompletionRequest, {"prompt": "a", "stop": ["x", ""]}, "stop"),
    "stop strings that are none": (CompletionRequest, {"prompt": "a", "stop": {"a": 1}}, "stop"),
    "a bias for a word": (CompletionRequest, {"prompt": "a", "logit_bias": {"word": 1}}, "logit_bias"),
    "a bias for no token": (CompletionRequest, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
    "a bias out of range": (CompletionRequest, {"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias"),
    "a seed out of range": (CompletionRequest, {"prompt": "a", "seed": 2 ** 63}, "seed"),
    "too many log-probabilities": (CompletionRequest, {"prompt": "a", "logprobs": 101}, "logprobs"),
    "no messages": (ChatCompletionRequest, {"messages": []}, "messages"),
    "a message without a role": (ChatCompletionRequest, {"messages": [{"content": "a"}]}, "role"),
    "a picture": (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                  "text alone"),
    "a role that the template refuses": (ChatCompletionRequest, {"messages": [{"role": "odd"}]},
                                         "no such role"),
    "likeliest tokens without logprobs": (ChatCompletionRequest, {"messages": HI, "top_logprobs": 2},
                                          "logprobs: true"),
    **{name: (ChatCompletionRequest, {"messages": HI, name: value}, name) for name,
       value in UNSUPPORTED.items()}}


@pytest.mark.parametrize("kind, body, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_answered_is_refused_with_the_reason(kind, body, says):
    with pytest.raises(APIError, match=says) as refused:
        asked(kind, **body)
    assert refused.value.status_code == 400


LONG = [{"role": "user", "content": "a" * 64}]
OVERFLOWS = {                                # {name: (endpoint, body, the parameter that is to blame)}
    "a prompt": (CompletionRequest, {"prompt": "a" * 65}, "prompt"),
    "ids": (CompletionRequest, {"prompt": [7] * 64}, "prompt"),
    "a prompt that is read alone": (CompletionRequest, {"prompt": "a" * 65, "max_tokens": 0}, "prompt"),
    "a text that no context spells": (CompletionRequest, {"prompt": "a" * 400}, "prompt"),
    "new tokens": (CompletionRequest, {"prompt": "a", "max_tokens": 64}, "max_tokens"),
    "new tokens by their new name": (CompletionRequest, {"prompt": "a", "max_completion_tokens": 64},
                                     "max_completion_tokens"),
    "messages": (ChatCompletionRequest, {"messages": LONG}, "messages"),
    "messages that no context spells": (ChatCompletionRequest, {"messages": LONG * 9}, "messages"),
    "a chat's new tokens": (ChatCompletionRequest, {"messages": HI, "max_tokens": 60}, "max_tokens"),
    "those by their new name": (ChatCompletionRequest,
                                {"messages": HI, "max_completion_tokens": 60, "max_tokens": 1},
                                "max_completion_tokens")}


@pytest.mark.parametrize("kind, body, param", OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_what_overflows_the_context_has_openais_code(kind, body, param):
    with pytest.raises(APIError) as refused:
        asked(kind, **body)
    error = refused.value.error_body()["error"]
    assert refused.value.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["type"] == "invalid_request_error"


def test_the_kv_memory_is_a_context_too():
    ready = EngineReady({**READY.info, "blocks": 4, "block_size": 8}, READY.tokenizer, TEMPLATE)
    assert build_engine_requests(parse_request_body(CompletionRequest,
                                                    json.dumps({"prompt": "a" * 31}).encode()), "name", ready)
    for kind, body, param in ((CompletionRequest, {"prompt": "a" * 32}, "prompt"),
                              (ChatCompletionRequest, {"messages": [{"role": "user", "content": "a" * 40}]},
                               "messages")):
        with pytest.raises(APIError, match="KV memory, which holds 32") as refused:
            build_engine_requests(parse_request_body(kind, json.dumps(body).encode()), "name", ready)
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)


@pytest.mark.parametrize("kind, body, param", [
    (CompletionRequest, {"prompt": "a", "top_p": 2}, "top_p"), (CompletionRequest, {"prompt": ""}, "prompt"),
    (ChatCompletionRequest, {"messages": HI, "logprobs": True, "top_logprobs": 101, "max_tokens": 1},
     "top_logprobs"),
    (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
    (CompletionRequest, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias")])
def test_a_refusal_names_the_clients_parameter(kind, body, param):
    with pytest.raises(APIError) as refused:
        asked(kind, **body)
    assert refused.value.error_body()["error"]["param"] == param and refused.value.code is None


def test_a_code_is_a_word_or_nothing():
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503):
        assert APIError(status, "why").error_body()["error"]["code"] is None
    assert APIError(404, "why", code="model_not_found").error_body()["error"]["code"] == "model_not_found"


def test_a_stop_string_that_is_a_special_token_is_sought_among_tokens():
    for kind, body in ((CompletionRequest, {"prompt": "a"}), (ChatCompletionRequest, {"messages": HI})):
        request, = asked(kind, **body, stop=["x", "<end>"], stop_token_ids=[7])
        assert request.stop == ("x", "<end>") and request.stop_token_ids == (7, 256)
        assert asked(kind, **body, stop="<en")[0].stop_token_ids == ()


def test_all_that_is_unsupported_is_tried():
    assert UNSUPPORTED.keys() == NOOP_VALUES_OF_UNSUPPORTED_FIELDS.keys()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[1]", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000, b"1e999"])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(APIError):
        parse_request_body(CompletionRequest, body)


def test_a_model_without_a_template_says_what_to_use():
    with pytest.raises(APIError, match="/v1/completions"):
        question = parse_request_body(ChatCompletionRequest, json.dumps({"messages": HI}).encode())
        build_engine_requests(question, "name", EngineReady(READY.info, text()))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
                    max_leaves=8)
LIKELY = st.integers(-2, 70) | st.floats(-2, 2) | st.booleans() | st.text(max_size=5) | st.lists(
    st.text(max_size=3) | st.integers(0, 300), max_size=3)
NAMES = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields,
                "tools"} | NOOP_VALUES_OF_UNSUPPORTED_FIELDS.keys())
BODIES = st.dictionaries(st.sampled_from(NAMES), JSON | LIKELY, max_size=4).map(
    lambda wrong: {"prompt": "a", "messages": HI, "max_tokens": 2} | wrong)


@given(BODIES, st.sampled_from([CompletionRequest, ChatCompletionRequest]))
def test_any_json_is_a_question_or_a_400(body, kind):
    try:
        assert all(each.prompt_token_ids for each in asked(kind, **body))
    except APIError as refused:
        assert refused.status_code == 400


def answer(kind, form, **body):
    question = parse_request_body(kind, json.dumps(body).encode())
    return form(question, "name", "model", build_engine_requests(question, "name", READY), READY.tokenizer)


def chunks(answer, events):
    chunks = map(answer.encode_stream_chunk, events)
    return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks if chunk]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason():
    said = answer(ChatCompletionRequest, ChatCompletionResponse, messages=HI, stream=True)
    got = chunks(said, [RequestOutput("name", token_ids=[1]), RequestOutput("name", text="a", token_ids=[2]),
                        RequestOutput("name", text="b", token_ids=[3], finish_reason="stop")])
    deltas = [each["choices"][0]["delta"] for each in got]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": "b"}]
    assert [each["choices"][0]["finish_reason"] for each in got] == [None, "stop"]
    assert all(each["id"] == "name" and each["object"] == "chat.completion.chunk" for each in got)
    assert "usage" not in got[0] and said.encode_stream_end() == b"data: [DONE]\n\n"


@pytest.mark.parametrize("always", [False, True])
def test_usage_comes_last_without_choices(always):
    said = answer(ChatCompletionRequest, ChatCompletionResponse, messages=HI, stream=True,
                  stream_options={"include_usage": True, "continuous_usage_stats": always})
    got, = chunks(said, [RequestOutput("name", text="a", token_ids=[1, 2], num_cached_tokens=99)])
    last, done, _ = said.encode_stream_end().split(b"\n\n")
    last = json.loads(last.removeprefix(b"data: "))
    assert last["choices"] == [] and done == b"data: [DONE]"
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7,
                             "prompt_tokens_details": {"cached_tokens": 5}}
    assert got["usage"] == (last["usage"] if always else None)


def test_choices_of_several_prompts_are_in_order():
    said = answer(CompletionRequest, CompletionResponse, prompt=["a", "b"], n=2, echo=True, max_tokens=2)
    events = [RequestOutput(f"name-{p}", i, f"{p}{i}", [1], finish_reason="length")
              for i in (1, 0) for p in (1, 0)]
    got = said.build_response_object([RequestOutput("name-1", 1, "first", [2]), *events])
    assert [each["text"] for each in got["choices"]] == ["a00", "a01", "b10", "bfirst11"]
    assert [each["index"] for each in got["choices"]] == [0, 1, 2, 3]
    assert got["usage"]["completion_tokens"] == 5


def test_log_probabilities_of_prompt_and_answer():
    said = answer(CompletionRequest, CompletionResponse, prompt="ab", echo=True, logprobs=2)
    a, b = ids("ab")
    strange = ids("é")[0]                    # half a character
    prompt = [Logprob(a, None), Logprob(b, -1.0, [(a, -0.5), (b, -1.0)])]
    made = [Logprob(a, -math.inf, [(strange, 0.0), (strange + 1, -1.0)])]
    got, = said.build_response_object([RequestOutput("name-0", 0, "a", [a], made, prompt,
                                      finish_reason="length")])["choices"]
    assert got["text"] == "aba"
    assert got["logprobs"] == {
        "tokens": ["a", "b", "a"], "text_offset": [0, 1, 2], "token_logprobs": [None, -1.0, -9999.0],
        "top_logprobs": [None, {"a": -0.5, "b": -1.0}, {"\ufffd": 0.0, "a": -9999.0}]}


def test_log_probabilities_of_a_chat():
    said = answer(ChatCompletionRequest, ChatCompletionResponse, messages=HI, logprobs=True, top_logprobs=1)
    a, half = ids("a")[0], ids("é")[0]
    got = said.build_response_object([RequestOutput("name", 0, "a", [a], [Logprob(a, -0.5, [(half, -0.25)])],
                                     finish_reason="stop")])
    assert got["choices"][0]["logprobs"]["content"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97],
         "top_logprobs": [{"token": "\ufffd", "logprob": -0.25, "bytes": [0xc3]}]}]
