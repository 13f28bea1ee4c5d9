"""The request body of OpenAI's Responses API (POST /v1/responses), read as a chat completion request.

Nothing is stored, so a request brings all messages. A parameter that is not supported and would change the
answer is refused by name, with the reason. Parameters about storing, caching, billing and safety change
nothing. The response is in responses_api_output.py.
"""
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, field_validator, model_validator

from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.chat_messages import ChatMessage
from nanoinfra.serve.server.openai.completion_requests import ChatCompletionRequest
from nanoinfra.serve.server.openai.request_fields import Int64, OpenAIBaseModel, unsupported_field

_CHAT_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PART_TYPES = ("input_text", "output_text", "text")     # of parts that a message may have
_INCLUDE_LOGPROBS = "message.output_text.logprobs"           # the value of `include` for log-probabilities
_NOT_STORED_REASON = "nothing is stored here; send all turns as input"
_UNSUPPORTED_ITEM_REASONS = {
    "item_reference": f"{_NOT_STORED_REASON}, as clients do that are told store: false"}

_ShortText = Annotated[str, Field(max_length=request_limits.MAX_CACHE_SALT_CHARS)]
_Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


def input_items_to_messages(value: Any) -> list[dict]:
    """The field `input` as chat messages.

    A text is one message of the user. In a list, each item is a message, a function call or its output.
    """
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text or a list of messages")
    if len(value) > request_limits.MAX_MESSAGES:
        raise ValueError(f"{len(value)} items; give at most {request_limits.MAX_MESSAGES}")
    messages = []
    for i, item in enumerate(value):
        message = _item_to_message(item, i)
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _item_to_message(item, i):
    item_type = (item.get("type") or "message") if isinstance(item, dict) else type(item).__name__
    if item_type == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if item_type == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"),
                "content": _item_text_parts(item.get("output"), i)}
    if item_type != "message":
        reason = _UNSUPPORTED_ITEM_REASONS.get(
            str(item_type), "this model reads messages and calls of functions alone")
        raise ValueError(f"item {i} is a {item_type!r:.80}: {reason}")
    role = item.get("role")
    if not isinstance(role, str) or role not in _CHAT_ROLES:
        raise ValueError(f"item {i} is of the role {role!r:.80}; give one of {', '.join(_CHAT_ROLES)}")
    return {"role": _CHAT_ROLES[role], "content": _item_text_parts(item.get("content"), i)}


def _item_text_parts(value, i):
    """The content of an input item in the form of chat messages."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if all(isinstance(part, dict) and part.get("type") in _TEXT_PART_TYPES
           and isinstance(part.get("text"), str) for part in parts):
        return [{"type": "text", "text": part["text"]} for part in parts]
    raise ValueError(f"item {i} has a part that is no text, and this model reads text alone; give parts as "
                     '{"type": "input_text", "text": "..."}')


def parse_responses_tools(value: Any) -> list[dict]:
    """The field `tools` in the form of chat completions, where `function` is an object of its own."""
    tools = [_to_chat_tool(tool) for tool in value] if isinstance(value, list) else value
    return request_fields.parse_tools(tools)


def _to_chat_tool(tool):
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def includes_logprobs(include: Any) -> bool:
    """True if `include` names the log-probabilities; its other values are about tools, images, reasoning."""
    if not isinstance(include, list) or not all(isinstance(each, str) for each in include):
        raise ValueError("give a list of texts")
    return _INCLUDE_LOGPROBS in include


class ReasoningOptions(OpenAIBaseModel):
    """The field `reasoning`. No effort can be chosen."""
    effort: unsupported_field("none", reason="the model has no efforts to choose from") = None


class PromptCacheOptions(OpenAIBaseModel):
    """The field `prompt_cache_options`. The prefix cache is always on."""
    prewarm: unsupported_field(False, reason="each request is answered") = None


class ResponseFormatText(OpenAIBaseModel):
    """The field `text.format`. Only plain text is supported."""
    type: unsupported_field("text", reason=request_fields.NO_GUIDED_DECODING_REASON) = "text"


class ResponseTextConfig(OpenAIBaseModel):
    """The field `text`: format and verbosity of the answer."""
    format: ResponseFormatText = ResponseFormatText()
    verbosity: unsupported_field("medium", reason="ask for it in words") = None


class ResponsesRequest(ChatCompletionRequest):
    """The body of POST /v1/responses. It also accepts vLLM's extra parameters of a chat completion."""
    client_field_names: ClassVar[dict[str, str]] = {"prompt": "input", "messages": "input",
                                                    "logprobs": "top_logprobs",
                                                    "max_tokens": "max_output_tokens"}
    messages: Annotated[list[ChatMessage], FailFast(),
                        BeforeValidator(input_items_to_messages)] = Field(alias="input")
    max_completion_tokens: Int64 | None = Field(None, alias="max_output_tokens")
    logprobs: Annotated[bool, BeforeValidator(includes_logprobs)] = Field(False, alias="include")
    n: Literal[1] = 1
    instructions: str | None = None
    tools: Annotated[list[dict], BeforeValidator(parse_responses_tools)] = []
    text: ResponseTextConfig = ResponseTextConfig()
    reasoning: ReasoningOptions = ReasoningOptions()
    prompt_cache_options: PromptCacheOptions = PromptCacheOptions()
    background: unsupported_field(False, reason="ask for a stream") = None
    context_management: unsupported_field([], reason="shorten the input yourself") = None
    conversation: unsupported_field(reason=_NOT_STORED_REASON) = None
    previous_response_id: unsupported_field(reason=_NOT_STORED_REASON) = None
    prompt: unsupported_field(reason="no prompts are stored here; send the text as input") = None
    truncation: unsupported_field("disabled", reason="shorten the input yourself") = None
    max_tool_calls: Int64 | None = None      # from here on: only repeated in the response
    metadata: Annotated[_Metadata, Field(max_length=16)] = {}
    prompt_cache_key: _ShortText | None = None
    safety_identifier: _ShortText | None = None
    user: _ShortText | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _need_logprobs(cls, value, info):
        if value and info.data.get("logprobs") is False:
            raise ValueError(f'needs include: ["{_INCLUDE_LOGPROBS}"]')
        return value or None

    @model_validator(mode="after")
    def _instructions_first(self):
        if self.instructions:
            self.messages.insert(0, ChatMessage(role="system", content=self.instructions))
        return self

    def client_field_name(self, engine_param: str | None) -> str | None:
        """The field of this body for a parameter of the engine, to name in an error."""
        return self.client_field_names.get(engine_param, engine_param)

    def request_fields_to_echo(self) -> dict:
        """The fields of the request that the response repeats."""
        names = ("instructions", "max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier",
                 "temperature", "top_p", "user")
        return {**{name: getattr(self, name) for name in names},
                "max_output_tokens": self.max_completion_tokens, "top_logprobs": self.top_logprobs or 0,
                "tool_choice": self.tool_choice or "auto",
                "tools": [_to_responses_tool(tool) for tool in self.tools],
                "parallel_tool_calls": True, "background": False, "previous_response_id": None,
                "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False,
                "truncation": "disabled", "text": {"format": {"type": "text"}, "verbosity": "medium"}}


def _to_responses_tool(tool):
    """A function tool in the form of the Responses API."""
    return {"description": None, "parameters": None, "strict": False, **tool["function"], "type": "function"}
