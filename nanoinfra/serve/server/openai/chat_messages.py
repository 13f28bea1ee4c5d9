"""Chat messages and tools, in the form that a chat template takes, and the prompt that it renders.

The form is that of transformers' apply_chat_template(messages, tools): arguments of a tool call are an
object (OpenAI's clients send JSON text), and a message with only tool calls has no content. A template that
does not know tools or tool calls silently leaves them out. So the chat is rendered with and without them,
and the request is refused if both prompts are the same.
"""
import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import from_json

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.request_fields import OpenAIBaseModel

# (chat_template, messages, tokenizer, tools or None) -> prompt
RenderTemplate = Callable[[str, list[dict], Tokenizer, list[dict] | None], str]


class ChatMessage(OpenAIBaseModel):
    """One message of a chat (the field `messages`)."""
    role: str
    content: Annotated[str | None, BeforeValidator(request_fields.parse_message_content)] = None
    name: str | None = None                  # from here on: for templates that use them
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Any],
                          Field(max_length=request_limits.MAX_TOOL_CALLS_PER_MESSAGE)] | None = None
    function_call: dict | None = None        # the old form of a tool call
    reasoning_content: str | None = None
    audio: request_fields.unsupported_field() = None
    prefix: request_fields.unsupported_field(False) = None   # continue this message

    def to_template_dict(self) -> dict:
        """The message as a template takes it, without fields that are not set."""
        fields = {name: value for name, value in self
                  if value is not None and name not in _FIELDS_NOT_FOR_TEMPLATE}
        calls = self.tool_calls or ([{"type": "function", "function": self.function_call}]
                                    if self.function_call else None)
        if calls:
            fields["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
        may_omit_content = bool(calls) and self.role == "assistant"      # as OpenAI's API allows
        return {"role": fields.pop("role"), **({} if may_omit_content else {"content": ""}), **fields}


_FIELDS_NOT_FOR_TEMPLATE = ("function_call", "audio", "prefix")


def render_chat_prompt(messages: list[ChatMessage], tools: list[dict] | None, engine_ready: EngineReady,
                       render_template: RenderTemplate) -> str:
    """The prompt that the model's chat template makes of `messages` and `tools`.

    Raises APIError for messages that the template rejects, and for tools or calls that it does not show.
    """
    template_messages = [message.to_template_dict() for message in messages]
    size = sum(len(message["role"]) + len(message.get("content", "")) for message in template_messages)
    size += sum(_json_length(message.get("tool_calls")) for message in template_messages)
    request_limits.check_text_length(size + _json_length(tools), engine_ready.info["context"],
                                     engine_ready.tokenizer.max_chars_per_token)

    def render(template_messages, tools):
        return render_template(engine_ready.chat_template, template_messages, engine_ready.tokenizer, tools)
    try:
        prompt = render(template_messages, tools)
    except Exception as error:               # a template is a program, and may raise anything
        raise APIError(400, f"the chat template does not take these: {error}", "messages") from error
    if tools and _renders_the_same(prompt, render, template_messages, None):
        raise APIError(400, "this model's chat template has no place for tools, so that the model would "
                       "never see them; leave tools out, or describe them in a message", "tools")
    without_calls = [_without_tool_calls(message) for message in template_messages]
    if without_calls != template_messages and _renders_the_same(prompt, render, without_calls, tools):
        raise APIError(400, "this model's chat template has no place for tool_calls of the assistant, so "
                       "that the model would never see them; write them into the content", "messages")
    return prompt


def _renders_the_same(prompt, render, template_messages, tools):
    """True if these render to the same prompt. A template that fails without tools or calls does use them."""
    try:
        return render(template_messages, tools) == prompt
    except Exception:
        return False


def _without_tool_calls(message):
    calls = "tool_calls" in message and message["role"] == "assistant"
    return {name: value for name, value in message.items() if name != "tool_calls"} if calls else message


def _with_parsed_arguments(call):
    """The call with its arguments parsed: templates write them as JSON, so text would be encoded twice."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = from_json(function["arguments"] or "{}")
    except ValueError:                       # invalid JSON of the model, or too deep: keep the text
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _json_length(value):
    """The number of characters of `value` as JSON; 0 for nothing."""
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) if value else 0
