"""What clients of OpenAI's Responses API send: a chat under other names.

Nothing is stored, so that a request brings all turns. A parameter that would change the answer and cannot be
followed is refused by its name, with the reason; those about storing, caching, paying and safety change none.
What comes back is in responses_answer.py.
"""
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field, field_validator, model_validator

from nanoinfra.serve import limits
from nanoinfra.serve.fields import Integer, Lenient
from nanoinfra.serve.protocol import Chat, Message

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
TEXTS = ("input_text", "output_text", "text")                # parts that a message may have
LOGPROBS = "message.output_text.logprobs"                    # what `include` may name, beside others' work
ITEMS = {"item_reference": "nothing is stored here; send the turn itself, as clients do after store: false",
         "function_call": "calls of tools are not supported here", "function_call_output": "the same"}

Name = Annotated[str, Field(max_length=limits.MOST_SALT_CHARS)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


def messages_of(given: Any) -> list[dict]:
    """`input` as the messages of a chat: a text is the user's; of a list each item is a turn."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError("give a text or a list of messages")
    if len(given) > limits.MOST_MESSAGES:
        raise ValueError(f"{len(given)} items; give at most {limits.MOST_MESSAGES}")
    return [_message(item, i) for i, item in enumerate(given)]


def _message(item, i):
    kind = (item.get("type") or "message") if isinstance(item, dict) else type(item).__name__
    if kind != "message":
        why = ITEMS.get(str(kind), "this model reads messages alone")
        raise ValueError(f"item {i} is a {kind!r:.80}: {why}")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"item {i} is of the role {role!r:.80}; give one of {', '.join(ROLES)}")
    content = item.get("content")
    if isinstance(content, list):
        content = [_text_part(part, i) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"the content of item {i} is no text and no list of parts")
    return {"role": ROLES[role], "content": content}


def _text_part(part, i):
    if not isinstance(part, dict) or part.get("type") not in TEXTS or not isinstance(part.get("text"), str):
        raise ValueError(f"item {i} has a part that is no text, and this model reads text alone; give parts "
                         'as {"type": "input_text", "text": "..."}')
    return {"type": "text", "text": part["text"]}


def includes_logprobs(given: Any) -> bool:
    """Does `include` name the log-probabilities? Its other values are about tools, pictures and reasoning."""
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ValueError("give a list of texts")
    return LOGPROBS in given


def only(*values: Any, why: str) -> BeforeValidator:
    """Refuses, with `why`, what is none of `values`, with which an answer is as it is without."""
    def check(given):
        if given not in values:
            kind = given.get("type") if isinstance(given, dict) else given
            named = f"{kind!r:.80} is" if isinstance(kind, str | int | float) else "it is"
            raise ValueError(f"{named} not supported: {why}")
        return given
    return BeforeValidator(check)


class Reasoning(Lenient):
    """How a model should think: this one says all that it thinks."""
    effort: Annotated[Any, only("none", why="this model does not think before it answers")] = None


class CacheOptions(Lenient):
    """Of the prompt cache, which is always on."""
    prewarm: Annotated[Any, only(False, why="each request is answered")] = None


class TextFormat(Lenient):
    """The form of the text."""
    type: Annotated[Any, only("text", why="nothing keeps the model to a form; ask for it in words")] = "text"


class TextOptions(Lenient):
    """What the text should be like."""
    format: TextFormat = TextFormat()
    verbosity: Annotated[Any, only("medium", why="ask for it in words, or set max_output_tokens")] = None


class ResponsesRequest(Chat):
    """The body of /v1/responses. What a chat takes beside OpenAI's parameters, this takes too."""
    messages: Annotated[list[Message], FailFast(), BeforeValidator(messages_of)] = Field(alias="input")
    max_completion_tokens: Integer | None = Field(None, alias="max_output_tokens")
    logprobs: Annotated[bool, BeforeValidator(includes_logprobs)] = Field(False, alias="include")
    top_logprobs: Integer | None = None
    n: Literal[1] = 1
    instructions: str | None = None
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    prompt_cache_options: CacheOptions = CacheOptions()
    tools: Annotated[Any, only([], why="describe what the model may do in the instructions")] = None
    background: Annotated[Any, only(False, why="ask for a stream")] = None
    context_management: Annotated[Any, only([], why="shorten the input yourself")] = None
    conversation: Annotated[Any, only(why="nothing is stored here; send all turns as input")] = None
    moderation: Annotated[Any, only(why="no moderation model is here")] = None
    previous_response_id: Annotated[Any, only(why="nothing is stored here; send all turns as input")] = None
    prompt: Annotated[Any, only(why="no prompts are stored here; send the text as input")] = None
    truncation: Annotated[Any, only("disabled", why="shorten the input yourself")] = None
    max_tool_calls: Integer | None = None                    # these are said again, no more
    metadata: Annotated[Metadata, Field(max_length=16)] = {}
    parallel_tool_calls: bool = True
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

    def echoed_fields(self) -> dict:
        """What a response says again of its request."""
        given = ("instructions", "max_tool_calls", "metadata", "parallel_tool_calls", "prompt_cache_key",
                 "safety_identifier", "temperature", "top_p", "user")
        return {**{name: getattr(self, name) for name in given},
                "max_output_tokens": self.max_completion_tokens, "top_logprobs": self.top_logprobs or 0,
                "tool_choice": self.tool_choice or "auto", "tools": self.tools or [], "background": False,
                "previous_response_id": None, "reasoning": {"effort": None, "summary": None},
                "service_tier": "default", "store": False, "truncation": "disabled",
                "text": {"format": {"type": "text"}, "verbosity": "medium"}}
