"""What clients of OpenAI's Responses API send: a chat under other names.

Nothing is stored, so that a request brings all turns. A parameter that would change the answer and cannot be
followed is refused by its name, with the reason; those about storing, caching, paying and safety change none.
What comes back is in responses_answer.py.
"""
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field, field_validator, model_validator

from nanoinfra.serve.server import limits
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.chat_messages import Message
from nanoinfra.serve.server.openai.completion_requests import Chat
from nanoinfra.serve.server.openai.request_fields import Integer, Lenient, unsupported

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXTS = ("input_text", "output_text", "text")                # parts that a message may have
LOGPROBS = "message.output_text.logprobs"                    # what `include` may name, beside others' work
NOT_STORED = "nothing is stored here; send all turns as input"
NO_TURNS = {"item_reference": f"{NOT_STORED}, as clients do that are told store: false"}

Name = Annotated[str, Field(max_length=limits.MOST_SALT_CHARS)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


def turns_of(given: Any) -> list[dict]:
    """`input` as the turns of a chat: a text is the user's; of a list each item is one, or a call of one."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError("give a text or a list of messages")
    if len(given) > limits.MOST_MESSAGES:
        raise ValueError(f"{len(given)} items; give at most {limits.MOST_MESSAGES}")
    turns = []
    for i, item in enumerate(given):
        turn = _turn(item, i)
        if "tool_calls" in turn and turns and turns[-1]["role"] == "assistant":
            turns[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            turns.append(turn)
    return turns


def _turn(item, i):
    kind = (item.get("type") or "message") if isinstance(item, dict) else type(item).__name__
    if kind == "function_call":
        function = {name: item.get(name) for name in ("name", "arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": _texts(item.get("output"), i)}
    if kind != "message":
        why = NO_TURNS.get(str(kind), "this model reads messages and calls of functions alone")
        raise ValueError(f"item {i} is a {kind!r:.80}: {why}")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"item {i} is of the role {role!r:.80}; give one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _texts(item.get("content"), i)}


def _texts(given, i):
    """The content of an item as a chat has it."""
    if given is None or isinstance(given, str):
        return given
    parts = given if isinstance(given, list) else [given]
    if all(isinstance(part, dict) and part.get("type") in TEXTS and isinstance(part.get("text"), str)
           for part in parts):
        return [{"type": "text", "text": part["text"]} for part in parts]
    raise ValueError(f"item {i} has a part that is no text, and this model reads text alone; give parts as "
                     '{"type": "input_text", "text": "..."}')


def tools_of(given: Any) -> list[dict]:
    """`tools` as a chat has them: what is said of a function lies in an object of its own."""
    return request_fields.tools([_nested(tool) for tool in given] if isinstance(given, list) else given)


def _nested(tool):
    if not isinstance(tool, dict) or tool.get("type") != "function" or "function" in tool:
        return tool
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def includes_logprobs(given: Any) -> bool:
    """Does `include` name the log-probabilities? Its other values are about tools, pictures and reasoning."""
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ValueError("give a list of texts")
    return LOGPROBS in given


class Reasoning(Lenient):
    """How a model should think: this one says all that it thinks."""
    effort: unsupported("none", why="the model has no efforts to choose from") = None


class CacheOptions(Lenient):
    """Of the prompt cache, which is always on."""
    prewarm: unsupported(False, why="each request is answered") = None


class TextFormat(Lenient):
    """The form of the text."""
    type: unsupported("text", why=request_fields.NO_FORM) = "text"


class TextOptions(Lenient):
    """What the text should be like."""
    format: TextFormat = TextFormat()
    verbosity: unsupported("medium", why="ask for it in words") = None


class ResponsesRequest(Chat):
    """The body of /v1/responses. What a chat takes beside OpenAI's parameters, this takes too."""
    spelled: ClassVar[dict[str, str]] = {"prompt": "input", "messages": "input", "logprobs": "top_logprobs",
                                         "max_tokens": "max_output_tokens"}
    messages: Annotated[list[Message], FailFast(), BeforeValidator(turns_of)] = Field(alias="input")
    max_completion_tokens: Integer | None = Field(None, alias="max_output_tokens")
    logprobs: Annotated[bool, BeforeValidator(includes_logprobs)] = Field(False, alias="include")
    n: Literal[1] = 1
    instructions: str | None = None
    tools: Annotated[list[dict], BeforeValidator(tools_of)] = []
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    prompt_cache_options: CacheOptions = CacheOptions()
    background: unsupported(False, why="ask for a stream") = None
    context_management: unsupported([], why="shorten the input yourself") = None
    conversation: unsupported(why=NOT_STORED) = None
    previous_response_id: unsupported(why=NOT_STORED) = None
    prompt: unsupported(why="no prompts are stored here; send the text as input") = None
    truncation: unsupported("disabled", why="shorten the input yourself") = None
    max_tool_calls: Integer | None = None                    # these are said again, no more
    metadata: Annotated[Metadata, Field(max_length=16)] = {}
    prompt_cache_key: Name | None = None
    safety_identifier: Name | None = None
    user: Name | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _asked_for(cls, given, info):
        if given and info.data.get("logprobs") is False:
            raise ValueError(f'needs include: ["{LOGPROBS}"]')
        return given or None

    @model_validator(mode="after")
    def _instructions_first(self):
        if self.instructions:
            self.messages.insert(0, Message(role="system", content=self.instructions))
        return self

    def to_blame(self, param: str | None) -> str | None:
        """The field that the client knows for a parameter of the engine's."""
        return self.spelled.get(param, param)

    def echoed_fields(self) -> dict:
        """What a response says again of its request."""
        given = ("instructions", "max_tool_calls", "metadata", "prompt_cache_key", "safety_identifier",
                 "temperature", "top_p", "user")
        return {**{name: getattr(self, name) for name in given},
                "max_output_tokens": self.max_completion_tokens, "top_logprobs": self.top_logprobs or 0,
                "tool_choice": self.tool_choice or "auto", "tools": [_flat(tool) for tool in self.tools],
                "parallel_tool_calls": True, "background": False, "previous_response_id": None,
                "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False,
                "truncation": "disabled", "text": {"format": {"type": "text"}, "verbosity": "medium"}}


def _flat(tool):
    """A function as the Responses API has it."""
    return {"description": None, "parameters": None, "strict": False, **tool["function"], "type": "function"}
