"""Tools and calls reach the template as transformers gives them to it, or the chat is refused."""
import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.chat_messages import ChatMessage, render_chat_prompt
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from nanoinfra.serve.server.request_limits import MAX_TOOLS
from tests.serve.fake import TEMPLATE, text

QWEN = """{%- if tools %}{{ '<tools>' }}{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{%- endfor %}
{{- '\\n</tools>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<assistant>' }}{%- if message.content %}{{ message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<call>{"name": "' + tool_call.name + '", "arguments": ' }}{{- tool_call.arguments | tojson }}
            {{- '}\\n' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}{{- '<response>' + message.content + '\\n' }}
    {%- else %}{{- '<' + message.role + '>' + message.content + '\\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""
HI = {"role": "user", "content": "Is it warm?"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of \u00c9vry, <now>",
                                            "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "\u00c9vry"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "tool", "tool_call_id": "1", "content": "22 \u00b0C"}


def prompt(template=QWEN, **body):
    ready = EngineReady({"context": 512, "vocab": 257}, text(), template)
    request, = build_engine_requests(parse_request_body(ChatCompletionRequest,
                                                        json.dumps({"messages": [HI], **body}).encode()),
                                     "name", ready)
    return ready.tokenizer.decode(request.prompt_token_ids)


def test_tools_are_rendered_as_transformers_renders_them():
    got, opened = prompt(tools=[WEATHER]), {"add_generation_prompt": True}
    assert got == render_jinja_template([[HI]], [WEATHER], chat_template=QWEN, **opened)[0][0]
    assert got.startswith('<tools>\n{"type": "function", "function": {"name": "weather"')
    assert got == prompt(tools=[WEATHER], tool_choice="auto")
    assert got == prompt(functions=[WEATHER["function"]], function_call="auto")


def test_a_model_that_may_call_none_is_shown_none():
    for body in ({}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"},
                 {"functions": [WEATHER["function"]], "function_call": "none"}):
        assert prompt(**body) == "<user>Is it warm?\n<assistant>"


def test_a_turn_of_calls_and_their_answer_are_rendered():
    """The arguments of a call are an object, as transformers' documentation wants them."""
    turns = [HI, CALLS, ANSWER]
    got = prompt(messages=turns)
    assert got == ('<user>Is it warm?\n<assistant><call>{"name": "weather", "arguments": {"city": '
                   '"\u00c9vry"}}\n<response>22 \u00b0C\n<assistant>')
    read_ = {**CALL["function"], "arguments": {"city": "\u00c9vry"}}
    turns[1] = {**CALLS, "tool_calls": [{**CALL, "function": read_}]}
    assert got == render_jinja_template([turns], chat_template=QWEN, add_generation_prompt=True)[0][0]
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    assert prompt(messages=[HI, old, ANSWER]) == got


@pytest.mark.parametrize("arguments, want", [
    ("", {}), ("{", "{"), ("[1]", [1]), ({"a": 1}, {"a": 1}), ("[" * 900 + "]" * 900,) * 2])
def test_arguments_that_are_no_json_stay_text(arguments, want):
    call = {"function": {"name": "f", "arguments": arguments}}
    said = ChatMessage(role="assistant", tool_calls=[call]).to_template_dict()
    assert said["tool_calls"] == [{"function": {"name": "f", "arguments": want}}]


SHOWS = ("{% for m in messages %}{{ m.role }}={{ m.content if m.content is defined else 'nothing' }}"
         "{{ m.tool_calls }};{{ m.reasoning_content }}{% endfor %}")


def test_null_is_nothing_where_a_turn_has_calls_alone_and_empty_elsewhere():
    turns = [{**CALLS, "tool_calls": [1]}, {"role": "assistant"}, {"role": "user", "content": None}]
    assert prompt(SHOWS, messages=turns) == "assistant=nothing[1];assistant=;user=;"
    turns[0]["content"] = ""
    assert prompt(SHOWS, messages=turns) == "assistant=[1];assistant=;user=;"
    assert prompt(SHOWS, messages=[{"role": "assistant", "reasoning_content": "hm"}]) == "assistant=;hm"


@pytest.mark.parametrize("body, param", [
    ({"tools": [WEATHER]}, "tools"), ({"functions": [WEATHER["function"]]}, "tools"),
    ({"messages": [HI, CALLS]}, "messages")])
def test_what_a_template_would_leave_out_is_refused(body, param):
    for template in (TEMPLATE, "{% if tools is defined %}{% endif %}{{ messages[0].role }}"):
        with pytest.raises(APIError, match="no place for tool.* would never see them") as refused:
            prompt(template, **body)
        assert (refused.value.status_code, refused.value.param) == (400, param)


@pytest.mark.parametrize("wrong, says", [
    ({"tools": [{"type": "custom"}]}, "type 'custom' is not supported"), ({"tools": [1]}, "type None"),
    ({"tools": [{"type": "function", "function": {}}]}, "no name"), ({"tools": {}}, "list of at most 128"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "no JSON schema"),
    ({"tools": [WEATHER], "functions": [WEATHER["function"]]}, "old name of tools"),
    ({"tools": [WEATHER] * (MAX_TOOLS + 1)}, "list of at most 128"),
    ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
    ({"messages": [{"role": "assistant", "audio": {"id": "1"}}]}, "audio")])
def test_tools_that_are_none_are_refused(wrong, says):
    with pytest.raises(APIError, match=says) as refused:
        prompt(**wrong)
    assert refused.value.status_code == 400


def test_tools_count_as_messages_do_before_anything_is_rendered():
    large = {"type": "function", "function": {"name": "f", "description": "a" * 2560}}
    for turn, tools in ((HI, [large]), ({**CALLS, "tool_calls": [large]}, None)):
        with pytest.raises(APIError, match="cannot fit") as refused:
            render_chat_prompt([ChatMessage(**turn)], tools, EngineReady({"context": 512}, text(), QWEN),
                               lambda *_: pytest.fail("rendered"))
        assert refused.value.code == "context_length_exceeded"
