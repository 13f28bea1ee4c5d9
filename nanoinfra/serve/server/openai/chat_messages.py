"""The turns of a chat and the tools that a model may call, as its chat template sees them.

That is what transformers' apply_chat_template(messages, tools) would show it: the arguments of a call as an
object, where OpenAI's clients send JSON text, and no content where a turn has nothing but calls. A template
that takes neither tools nor calls leaves them out and says nothing: so it renders twice, and what makes no
difference is refused.
"""
import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import from_json

from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.server import limits
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.request_fields import Lenient

# (template, messages, text, tools or None): the prompt
Render = Callable[[str, list[dict], Text, list[dict] | None], str]


class Message(Lenient):
    """One turn of a chat."""
    role: str
    content: Annotated[str | None, BeforeValidator(request_fields.content)] = None
    name: str | None = None                  # these for templates that ask for them
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=limits.MOST_TOOL_CALLS)] | None = None
    function_call: dict | None = None        # what a tool call was called before
    reasoning_content: str | None = None
    audio: request_fields.unsupported() = None
    prefix: request_fields.unsupported(False) = None                 # to go on with this turn

    def for_template(self) -> dict:
        """The turn without what it has not."""
        said = {name: value for name, value in self if value is not None and name not in LEFT_OUT}
        calls = self.tool_calls or ([{"type": "function", "function": self.function_call}]
                                    if self.function_call else None)
        if calls:
            said["tool_calls"] = [_with_arguments_read(call) for call in calls]
        needless = bool(calls) and self.role == "assistant"  # OpenAI: such a turn may have no content
        return {"role": said.pop("role"), **({} if needless else {"content": ""}), **said}


LEFT_OUT = ("function_call", "audio", "prefix")


def render_prompt(messages: list[Message], tools: list[dict] | None, ready: Ready, render: Render) -> str:
    """The prompt that the model's template makes. Raises Refused for what it does not take, or not show."""
    turns = [message.for_template() for message in messages]
    size = sum(len(turn["role"]) + len(turn.get("content", "")) for turn in turns)
    size += sum(_size(turn["tool_calls"]) for turn in turns if "tool_calls" in turn)
    limits.check_chars(size + _size(tools), ready.info["context"], ready.text.max_chars_per_token)

    def rendered(turns, tools):
        return render(ready.template, turns, ready.text, tools)
    try:
        prompt = rendered(turns, tools)
    except Exception as error:               # a template is a program: these messages have made it fail
        raise Refused(400, f"the chat template does not take these: {error}", "messages") from error
    if tools and _is_same(prompt, rendered, turns, None):
        raise Refused(400, "this model's chat template has no place for tools, so that the model would never "
                           "see them; leave tools out, or describe them in a message", "tools")
    if (silent := [_without_calls(turn) for turn in turns]) != turns and _is_same(prompt, rendered, silent,
                                                                                 tools):
        raise Refused(400, "this model's chat template has no place for tool_calls of the assistant, so that "
                           "the model would never see them; write them into the content", "messages")
    return prompt


def _is_same(prompt, rendered, turns, tools):
    """Is the prompt the same with these? A template that fails without them takes them."""
    try:
        return rendered(turns, tools) == prompt
    except Exception:
        return False


def _without_calls(turn):
    calls = "tool_calls" in turn and turn["role"] == "assistant"
    return {name: value for name, value in turn.items() if name != "tool_calls"} if calls else turn


def _with_arguments_read(call):
    """A call whose arguments are an object: templates write them as JSON, which text would be twice."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = from_json(function["arguments"] or "{}")
    except ValueError:                       # the model's own mistake, which it may see again; or too deep
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _size(given):
    """Characters of JSON."""
    return len(json.dumps(given, ensure_ascii=False, separators=(",", ":"))) if given else 0
