"""The Responses API as openai's package has it: each parameter, the object, and the events of a stream."""
import asyncio
import json
import math
from typing import get_type_hints

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import TypeAdapter

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import Logprob, RequestOutput
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.completion_requests import build_engine_requests, parse_request_body
from nanoinfra.serve.server.openai.responses_api_output import ResponsesResponse
from nanoinfra.serve.server.openai.responses_api_requests import _INCLUDE_LOGPROBS, ResponsesRequest
from nanoinfra.serve.server.request_limits import MAX_MESSAGES
from tests.serve.host import serving
from tests.serve.test_completion_requests import JSON, LIKELY, READY, answer, asked, ids

HI = "u:hi\n"                                # what the fake's template makes of the text "hi"
OPENING = ["response.created", "response.in_progress", "response.output_item.added",
           "response.content_part.added"]
CLOSING = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
DELTA = "response.output_text.delta"


@pytest.fixture(scope="module")
def url():
    with serving() as (client, _):
        yield f"{client.base_url}/v1"


@pytest.fixture
def ai(url):
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as ai:
        yield ai


def request(**body):
    made, = asked(ResponsesRequest, **{"input": "hi", **body})
    return made


def valid(response):
    """A response as openai's package types it, nothing converted."""
    return Response.model_validate(response, strict=True)


def events_of(stream):
    """Server-sent events, each as openai's package types it, checked to be named and numbered."""
    kinds, found = TypeAdapter(ResponseStreamEvent), []
    for number, said in enumerate(stream.decode().removesuffix("\n\n").split("\n\n")):
        named, data = said.split("\n")
        data = json.loads(data.removeprefix("data: "))
        assert named == f"event: {data['type']}" and data["sequence_number"] == number
        found.append(kinds.validate_python(data, strict=True))
    return found


TURNS = {
    "a text": ("hi", "u:hi\n"),
    "a message": ([{"role": "user", "content": "hi"}], "u:hi\n"),
    "a message that says its type": ([{"type": "message", "role": "user", "content": "hi"}], "u:hi\n"),
    "parts": ([{"role": "user", "content": [{"type": "input_text", "text": "a"},
                                            {"type": "input_text", "text": "b"}]}], "u:a\nb\n"),
    "earlier turns": ([
        {"role": "developer", "content": "be"}, {"role": "user", "content": "a"},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
        {"role": "user", "content": "c"}], "s:be\nu:a\na:b\nu:c\n")}


@pytest.mark.parametrize("turns, want", TURNS.values(), ids=TURNS.keys())
def test_input_becomes_the_turns_of_a_chat(turns, want):
    assert request(input=turns).prompt_token_ids == ids(want)
    assert request(input=turns, instructions="do").prompt_token_ids == ids("s:do\n" + want)


HONOURED = {                                 # and what of the engine's request shows it
    "input": ("you", lambda made: made.prompt_token_ids == ids("u:you\n")),
    "instructions": ("be", lambda made: made.prompt_token_ids == ids("s:be\nu:hi\n")),
    "max_output_tokens": (7, lambda made: made.max_tokens == 7),
    "temperature": (0.5, lambda made: made.sampling_params.temperature == 0.5),
    "top_p": (0.5, lambda made: made.sampling_params.top_p == 0.5),
    "include": ([_INCLUDE_LOGPROBS], lambda made: made.logprobs == 0)}
HARMLESS = {                                 # the answer's text is what it is without them
    "access_programs": {"cyber": "standard"}, "background": False,
    "background_options": {"continuation_id": "x"}, "context_management": [],
    "image": {"context_compression": "auto"}, "include": ["reasoning.encrypted_content"],
    "max_tool_calls": 3, "metadata": {"a": "b"}, "model": "model", "parallel_tool_calls": True,
    "prompt_cache_key": "x", "prompt_cache_options": {"mode": "implicit"}, "prompt_cache_retention": "24h",
    "reasoning": {"effort": "none", "summary": "auto"}, "safety_identifier": "x", "service_tier": "flex",
    "store": True, "stream": False, "stream_options": {"include_obfuscation": True}, "top_logprobs": 0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [],
    "truncation": "disabled", "user": "x"}
SCHEMA = {"type": "json_schema", "name": "x", "schema": {}}
REFUSED = {                                  # each by its name, with a reason
    "background": (True, "ask for a stream"),
    "context_management": ([{"type": "compaction"}], "shorten the input"),
    "conversation": ("conv_1", "nothing is stored"),
    "include": ("all", "list of texts"),
    "input": (3, "a text or a list"),
    "max_output_tokens": (-1, "-1"),
    "metadata": ({"a": "b" * 513}, "512"),
    "moderation": ({"model": "omni"}, "not supported"),
    "previous_response_id": ("resp_1", "send all turns as input"),
    "prompt": ({"id": "pmpt_1"}, "no prompts are stored"),
    "prompt_cache_options": ({"prewarm": True}, "each request is answered"),
    "parallel_tool_calls": (False, "comes as text"),
    "reasoning": ({"effort": "high"}, "'high' is not supported: the model has no efforts"),
    "text": ({"format": SCHEMA}, "'json_schema' is not supported: nothing here holds a model to a form"),
    "tool_choice": ("required", "not supported"),
    "tools": ([{"type": "web_search"}], "'web_search' is not supported; give functions alone"),
    "top_logprobs": (2, _INCLUDE_LOGPROBS),
    "truncation": ("auto", "shorten the input")}


def test_every_parameter_of_openais_is_in_one_of_the_tables():
    params = get_type_hints(ResponseCreateParamsNonStreaming).keys()
    assert params <= HONOURED.keys() | HARMLESS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_reaches_the_engine(name):
    value, shows = HONOURED[name]
    assert shows(request(**{name: value})) and not shows(request())


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_harmless_changes_nothing(name):
    assert request(**{name: HARMLESS[name]}) == request(**{name: None}) == request()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_its_name(name):
    value, says = REFUSED[name]
    with pytest.raises(APIError, match=says) as refused:
        request(**{name: value})
    assert refused.value.status_code == 400 and refused.value.param.split(".")[0] == name


ITEMS = {
    "a picture": ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "text alone"),
    "a file": ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, "text alone"),
    "a refusal": ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "text alone"),
    "a part without text": ({"role": "user", "content": [{"type": "input_text"}]}, "text alone"),
    "a number for content": ({"role": "user", "content": 3}, "text alone"),
    "a role nobody has": ({"role": "critic", "content": "a"}, "'critic'"),
    "no role": ({"content": "a"}, "role None"),
    "a reference": ({"type": "item_reference", "id": "msg_1"}, "store: false"),
    "a call of something else": ({"type": "web_search_call", "id": "1"}, "'web_search_call'"),
    "thoughts": ({"type": "reasoning", "id": "rs_1", "summary": []}, "'reasoning'"),
    "a type that is none": ({"type": [1]}, "messages and calls"),
    "no object": (3, "'int'")}


@pytest.mark.parametrize("item, says", ITEMS.values(), ids=ITEMS.keys())
def test_an_item_that_is_no_text_is_refused_with_its_place(item, says):
    with pytest.raises(APIError, match=says) as refused:
        request(input=[{"role": "user", "content": "a"}, item])
    assert "item 1" in str(refused.value) and refused.value.param == "input"


TOOLS = ("{% for t in tools or [] %}{{ t.function | tojson }}\n{% endfor %}{% for m in messages %}"
         "{{ m.role[0] }}:{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
         "[{{ c.id }} {{ c.function.name }} {{ c.function.arguments.a }}]{% endfor %}{{ '\n' }}{% endfor %}")
CALLED = [{"role": "user", "content": "hi"},
          {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 2}', "id": "fc_1"},
          {"type": "function_call", "call_id": "2", "name": "g", "arguments": '{"a": 3}'},
          {"type": "function_call_output", "call_id": "1", "output": "4"},
          {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "5"}]}]
FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {}, "strict": None}


def test_tools_and_calls_are_rendered_as_a_chats():
    body = {"input": CALLED, "tools": [FUNCTION], "max_output_tokens": 1}
    question = parse_request_body(ResponsesRequest, json.dumps(body).encode())
    made, = build_engine_requests(question, "name", EngineReady({**READY.info, "context": 128},
                                                                READY.tokenizer, TOOLS))
    assert READY.tokenizer.decode(made.prompt_token_ids) == (
        '{"name": "f", "description": "d", "parameters": {}}\nu:hi\na:[1 f 2][2 g 3]\nt:4\nt:5\n')
    got = valid(ResponsesResponse(question, "name", "model", [made],
                                  READY.tokenizer)._response("in_progress"))
    assert [(tool.name, tool.description, tool.strict) for tool in got.tools] == [("f", "d", False)]


@pytest.mark.parametrize("body, param", [({"tools": [FUNCTION]}, "tools"), ({"input": CALLED}, "input")])
def test_tools_and_calls_that_the_template_would_not_show_are_refused(body, param):
    with pytest.raises(APIError, match="no place for tool") as refused:
        request(**body)
    assert refused.value.param == param


def test_items_are_counted_before_they_are_read():
    with pytest.raises(APIError, match=f"at most {MAX_MESSAGES}"):
        request(input=[{}] * (MAX_MESSAGES + 1))


NAMES = sorted({field.alias or name for name, field in ResponsesRequest.model_fields.items()})
ITEM = st.dictionaries(st.sampled_from(["type", "role", "content"]), JSON | st.sampled_from(
    ["message", "user", [{"type": "input_text"}], [{"type": "input_text", "text": "a"}]]), max_size=3)
BODIES = st.dictionaries(st.sampled_from(NAMES), JSON | LIKELY | st.lists(ITEM, max_size=3), max_size=4)


@given(BODIES)
@settings(max_examples=60, deadline=None)
def test_any_json_is_answered_or_a_400(wrong):
    try:
        made, = asked(ResponsesRequest, **{"input": "hi", "max_output_tokens": 2, **wrong})
        assert made.prompt_token_ids and made.n == 1
    except APIError as refused:
        assert refused.status_code == 400


def whole(*events, **body):
    return valid(answer(ResponsesRequest, ResponsesResponse, input="hi",
                        **body).build_response_object(events))


def test_a_response_is_valid_for_openais_types():
    got = whole(RequestOutput("name", text="a", token_ids=[1], num_cached_tokens=3),
                RequestOutput("name", text="b", token_ids=[2, 3], finish_reason="stop"), metadata={"k": "v"},
                instructions="be",
                max_output_tokens=9, temperature=0.5, user="me")
    message, = got.output
    assert (got.status, got.output_text, got.error, got.incomplete_details) == ("completed", "ab", None, None)
    assert (message.status, message.content[0].annotations) == ("completed", [])
    assert (got.metadata, got.instructions, got.max_output_tokens) == ({"k": "v"}, "be", 9)
    assert (got.temperature, got.top_p, got.user, got.store) == (0.5, 1.0, "me", False)
    usage = got.usage
    size = len(ids("s:be\n" + HI))
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (size, 3, size + 3)
    assert usage.input_tokens_details.cached_tokens == 3 and usage.output_tokens_details.reasoning_tokens == 0
    assert got.completed_at >= got.created_at


def test_a_response_that_was_cut_says_so():
    got = whole(RequestOutput("name", text="a", token_ids=[1], finish_reason="length"))
    assert (got.status, got.output[0].status) == ("incomplete", "incomplete")
    assert got.incomplete_details.reason == "max_output_tokens" and got.completed_at is None


def test_log_probabilities_are_the_parts():
    a, b = ids("ab")
    made = RequestOutput("name", 0, "a", [a], [Logprob(a, -math.inf, [(b, -0.5)])], finish_reason="stop")
    said, = whole(made, include=[_INCLUDE_LOGPROBS], top_logprobs=1).output[0].content[0].logprobs
    assert (said.token, said.bytes, said.logprob) == ("a", [97], -9999.0)
    assert [(each.token, each.logprob) for each in said.top_logprobs] == [("b", -0.5)]


def stream(*events, **body):
    said = answer(ResponsesRequest, ResponsesResponse, input="hi", stream=True, **body)
    return said, b"".join(map(said.encode_stream_chunk, events))


@pytest.mark.parametrize("finish, ends", [("stop", "completed"), ("length", "incomplete")])
def test_a_stream_has_openais_events_in_order(finish, ends):
    said, begun = stream(RequestOutput("name", token_ids=[1]), RequestOutput("name", text="a", token_ids=[2]),
                         RequestOutput("name", text="b", token_ids=[3], finish_reason=finish))
    got = events_of(begun + said.encode_stream_end())
    assert [each.type for each in got] == [*OPENING, DELTA, DELTA, *CLOSING, f"response.{ends}"]
    first, last = got[0].response, got[9].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    assert (got[2].item.content, got[3].part.text) == ([], "")
    assert [each.delta for each in got[4:6]] == ["a", "b"]
    assert got[6].text == got[7].part.text == got[8].item.content[0].text == last.output_text == "ab"
    assert {each.item_id for each in got[3:8]} == {got[2].item.id, got[8].item.id}
    assert last.id == first.id and last.usage.output_tokens == 3


def test_log_probabilities_come_with_the_text():
    a, b = ids("ab")
    said, begun = stream(RequestOutput("name", 0, "", [a], [Logprob(a, -0.5)]),
                         RequestOutput("name", 0, "ab", [b], [Logprob(b, -0.25)], finish_reason="stop"),
                         include=[_INCLUDE_LOGPROBS])
    got = events_of(begun + said.encode_stream_end())
    assert [[each.logprob for each in said.logprobs] for said in got[4:7]] == [[-0.5], [-0.25], [-0.5, -0.25]]


@pytest.mark.parametrize("events", [[], [RequestOutput("name", text="a", token_ids=[2])]], ids=["at once",
                                                                                                "midway"])
@pytest.mark.parametrize("status, code", [(500, "server_error"), (429, "rate_limit_exceeded")])
def test_a_stream_that_fails_ends_with_why(events, status, code):
    said, begun = stream(*events)
    got = events_of(begun + said.encode_stream_error(APIError(status, "no more")))
    assert [each.type for each in got] == [*OPENING, *[DELTA] * len(events), "response.failed"]
    failed = got[-1].response
    assert (failed.status, failed.error.code, failed.error.message) == ("failed", code, "no more")


def test_the_end_of_a_long_stream_is_known_to_be_long():
    said, _ = stream(*[RequestOutput("name", text="a", token_ids=[1] * 40) for _ in range(60)])
    assert said.is_slow_to_encode(said.num_tokens_at_stream_end)


def test_what_says_much_of_its_request_again_is_written_where_nobody_waits():
    for size, want in ((100, False), (20_000, True)):
        body = json.dumps({"input": "hi", "instructions": "a" * size}).encode()
        said = ResponsesResponse(parse_request_body(ResponsesRequest, body), "name", "model", [request()],
                                 READY.tokenizer)
        assert said.is_slow_to_encode(1) == want


def test_openai_creates_a_response(ai):
    got = ai.responses.create(model="fake", input="hi", max_output_tokens=4, metadata={"a": "b"})
    assert valid(got.to_dict()).output_text == "u:hi" and got.id.startswith("resp_")
    assert (got.status, got.metadata, got.model) == ("incomplete", {"a": "b"}, "fake")
    got = ai.responses.create(model="fake", instructions="be", input=[{"role": "user", "content": "hi<end>"}])
    assert (got.status, got.output_text) == ("completed", "s:be\nu:hi")
    more = ai.responses.create(model="fake", max_output_tokens=16, input=[
        {"role": "user", "content": "hi"}, *got.to_dict()["output"], {"role": "user", "content": "so"}])
    assert more.output_text == "u:hi\na:s:be\nu:hi\n"[:16]


def test_openai_streams_a_response(ai):
    plain = list(ai.responses.create(model="fake", input="hi é", max_output_tokens=6, stream=True))
    assert "".join(each.delta for each in plain if each.type == DELTA) == "u:hi \ufffd"
    assert [each.sequence_number for each in plain] == list(range(len(plain)))
    with ai.responses.stream(model="fake", input="hi<end>") as helper:
        kinds = [each.type for each in helper]
        assert helper.get_final_response().output_text == "u:hi"
    assert kinds == [*OPENING, *[DELTA] * 4, *CLOSING, "response.completed"]


def test_openai_streams_a_response_asynchronously(url):
    async def said():
        async with (openai.AsyncOpenAI(base_url=url, api_key="any") as ai,
                    ai.responses.stream(model="fake", input="hi<end>") as helper):
            return [each async for each in helper], await helper.get_final_response()
    events, final = asyncio.run(said())
    assert final.output_text == "".join(each.delta for each in events if each.type == DELTA) == "u:hi"


def test_openai_raises_what_it_is_refused(ai):
    with pytest.raises(openai.BadRequestError, match="nothing is stored") as refused:
        ai.responses.create(model="fake", input="hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    stored = ai.responses
    for call in (stored.retrieve, stored.delete, stored.cancel, stored.input_items.list):
        with pytest.raises(openai.NotFoundError, match="'resp_1' here: answers are not stored"):
            call("resp_1")
