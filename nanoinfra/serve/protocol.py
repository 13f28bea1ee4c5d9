"""What clients of OpenAI's API send to its two endpoints, and what the engine is asked then.

Taken from what real clients send. A null means the default; a field that is not known is dropped unread; one
that is known, not supported, and would change the answer is refused. Which numbers are possible the engine's
own check says (requests.py), how much of everything limits.py.
"""
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, ValidationError

from nanoinfra.model.text import Text, render_chat
from nanoinfra.serve import fields, limits
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.fields import HARMLESS as HARMLESS
from nanoinfra.serve.fields import Integer, Lenient, Unsupported
from nanoinfra.serve.loop import Ready
from nanoinfra.serve.requests import Request, Sampling, check

Bias = Annotated[float, Field(ge=-100, le=100)]
Render = Callable[[str, list[dict], Text], str]              # (template, messages, text): the prompt


class StreamOptions(Lenient):
    """What a stream says beside the text."""
    include_usage: bool = False              # in a last chunk without choices
    continuous_usage_stats: bool = False     # and in every other


class Question(Unsupported):
    """What both endpoints take. The defaults are OpenAI's."""
    model: str | None = None
    max_tokens: Integer | None = None
    n: Integer = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[str], BeforeValidator(fields.texts), Field(max_length=limits.MOST_STOPS)] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(fields.biases)] = {}
    seed: Integer | None = None
    ignore_eos: bool = False
    cache_salt: Annotated[str, Field(max_length=limits.MOST_SALT_CHARS)] = ""

    def _request(self, name, tokens, max_tokens, logprobs, echo=False) -> Request:
        if "" in self.stop:
            raise Refused(400, "a stop string is empty; leave it out", "stop")
        sampling = Sampling(self.temperature, max(0, self.top_k), self.top_p, self.min_p,
                            self.presence_penalty, self.frequency_penalty, self.repetition_penalty,
                            self.logit_bias, self.seed)
        return Request(name, tokens, sampling, max_tokens, self.n, tuple(self.stop), self.ignore_eos,
                       logprobs, echo, self.cache_salt)


class Completion(Question):
    """The body of /v1/completions."""
    prompt: Annotated[list[Any], BeforeValidator(fields.prompts), Field(max_length=limits.MOST_PROMPTS)]
    logprobs: Integer | None = None
    echo: bool = False
    add_special_tokens: bool = True

    def requests(self, name: str, ready: Ready, render: Render) -> list[Request]:
        """One for each prompt."""
        limits.check_choices(len(self.prompt), self.n)
        context = ready.info["context"]
        most = 16 if self.max_tokens is None else self.max_tokens
        scored = self.echo and (self.logprobs is not None or most == 0)
        made, size = [], 0
        for i, given in enumerate(self.prompt):
            tokens = given if isinstance(given, list) else limits.encode(given, ready.text, context,
                                                                         self.add_special_tokens)
            size += len(tokens)
            limits.check_prompt_tokens(size, context)
            made.append(self._request(f"{name}-{i}", tokens, most, self.logprobs, scored))
        return made


class Message(Lenient):
    """One turn of a chat."""
    role: str
    content: Annotated[str, BeforeValidator(fields.content)] = ""
    name: str | None = None                  # these three for templates that ask for them
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Any], Field(max_length=limits.MOST_TOOL_CALLS)] | None = None


class Chat(Question):
    """The body of /v1/chat/completions."""
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=limits.MOST_MESSAGES)]
    max_completion_tokens: Integer | None = None
    logprobs: bool = False
    top_logprobs: Integer | None = None

    def requests(self, name: str, ready: Ready, render: Render) -> list[Request]:
        """One, of all messages in the model's template; by default it may fill the model's context."""
        if ready.template is None:
            raise Refused(400, "this model has no chat template; use /v1/completions")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        limits.check_choices(1, self.n)
        context, logprobs = ready.info["context"], (self.top_logprobs or 0) if self.logprobs else None
        tokens = limits.encode(self._rendered(ready, render), ready.text, context, begin=False)
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if most is None:
            most = max(1, min(context - len(tokens), limits.most_tokens(context, self.n, logprobs)))
        return [self._request(name, tokens, most, logprobs)]

    def _rendered(self, ready, render):
        messages = [{name: value for name, value in message if value is not None}
                    for message in self.messages]
        size = sum(len(message.role) + len(message.content) for message in self.messages)
        limits.check_chars(size, ready.info["context"], ready.text.max_chars_per_token)
        try:
            return render(ready.template, messages, ready.text)
        except Exception as error:           # a template is a program: these messages have made it fail
            raise Refused(400, f"the chat template does not take these: {error}", "messages") from error


def read(kind: type[Question], body: bytes) -> Question:
    """The body of an HTTP request. Raises Refused for one that is not as it must be."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False, include_context=False)
        where = ".".join(map(str, first["loc"]))
        also = f" (and {len(more)} more)" if more else ""
        says = first["msg"].removeprefix("Value error, ")
        raise Refused(400, f"{where}: {says}{also}" if where else says + also, where or None) from None


def requests_of(question: Question, name: str, ready: Ready, render: Render = render_chat) -> list[Request]:
    """What the engine is asked. Raises Refused for what no engine with this model could answer.

    `render(template, messages, text)` makes a prompt of a chat.
    """
    requests = question.requests(name, ready, render)
    for request in requests:
        try:
            check(request, ready.info["context"], ready.info["vocab"])
        except ValueError as error:
            raise Refused(400, str(error)) from None
    limits.check_answer(requests, getattr(question, "echo", False), ready.info["context"])
    return requests
