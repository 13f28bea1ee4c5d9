"""What clients of OpenAI's API send to its two endpoints, and what the engine is asked then.

Taken from what real clients send. A null means the default; a field that is not known is dropped unread; one
that is known, not supported, and would change the answer is refused (fields.py). Which numbers are possible
the engine's own check says (requests.py), how much of everything limits.py, what a chat becomes chats.py.
"""
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field, ValidationError

from nanoinfra.model.tokenizer import Text, render_chat
from nanoinfra.serve.engine.requests import Request, Sampling, Unanswerable, check
from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.server import limits
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.chat_messages import Message, Render, render_prompt
from nanoinfra.serve.server.openai.request_fields import HARMLESS as HARMLESS
from nanoinfra.serve.server.openai.request_fields import Integer, Lenient, Unsupported, unsupported

Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Lenient):
    """What a stream says beside the text."""
    include_usage: bool = False              # in a last chunk without choices
    continuous_usage_stats: bool = False     # and in every other


class Question(Unsupported):
    """What both endpoints take. The defaults are OpenAI's."""
    spelled: ClassVar[dict[str, str]] = {}   # what a parameter of the engine's is called here
    model: str | None = None
    max_tokens: Integer | None = None
    max_completion_tokens: Integer | None = None             # its new name, which clients send to both
    n: Integer = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[str], BeforeValidator(request_fields.texts),
                    Field(max_length=limits.MOST_STOPS)] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Integer = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(request_fields.biases)] = {}
    seed: Integer | None = None              # null or -1: another each time
    ignore_eos: bool = False
    min_tokens: Integer = 0
    stop_token_ids: Annotated[list[Integer], Field(max_length=limits.MOST_STOPS)] = []
    cache_salt: Annotated[str, Field(max_length=limits.MOST_SALT_CHARS)] = ""

    @property
    def most(self) -> int | None:
        """How many tokens may come, if the client says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def to_blame(self, param: str | None) -> str | None:
        """The field that the client knows for a parameter of the engine's."""
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return self.spelled.get(param, param)

    def _request(self, name, tokens, max_tokens, logprobs, text: Text, echo=False) -> Request:
        if "" in self.stop:
            raise Refused(400, "a stop string is empty; leave it out", "stop")
        sampling = Sampling(self.temperature, max(0, self.top_k), self.top_p, self.min_p,
                            self.presence_penalty, self.frequency_penalty, self.repetition_penalty,
                            self.logit_bias, None if self.seed == -1 else self.seed)
        return Request(name, tokens, sampling, max_tokens, self.n, tuple(self.stop), self.ignore_eos,
                       logprobs, echo, self.cache_salt, self._stop_token_ids(text), self.min_tokens)

    def _stop_token_ids(self, text):
        """Those asked for, and of stop strings that are special tokens: no text ever shows these."""
        named = (text.backend.token_to_id(stop) for stop in self.stop)
        return (*self.stop_token_ids, *(token for token in named if token in text.special_ids))


ONLY_CHATS = "tools are for /v1/chat/completions"


class Completion(Question):
    """The body of /v1/completions."""
    prompt: Annotated[list[Any], BeforeValidator(request_fields.prompts),
                      Field(max_length=limits.MOST_PROMPTS)]
    logprobs: Integer | None = None
    echo: bool = False
    add_special_tokens: bool = True
    top_logprobs: unsupported(why="here logprobs is their number") = None
    tools: unsupported([], why=ONLY_CHATS) = None
    functions: unsupported([], why=ONLY_CHATS) = None
    tool_choice: unsupported(*request_fields.CALLS, why=ONLY_CHATS) = None
    function_call: unsupported(*request_fields.CALLS, why=ONLY_CHATS) = None

    def requests(self, name: str, ready: Ready, render: Render) -> list[Request]:
        """One for each prompt."""
        limits.check_choices(len(self.prompt), self.n)
        context = ready.info["context"]
        most = 16 if self.most is None else self.most
        scored = self.echo and (self.logprobs is not None or most == 0)
        made, size = [], 0
        for i, given in enumerate(self.prompt):
            tokens = given if isinstance(given, list) else limits.encode(given, ready.text, context,
                                                                         self.add_special_tokens)
            size += len(tokens)
            limits.check_prompt_tokens(size, context)
            made.append(self._request(f"{name}-{i}", tokens, most, self.logprobs, ready.text, scored))
        return made


class Chat(Question):
    """The body of /v1/chat/completions. What the model says comes as text, calls of tools too."""
    spelled: ClassVar[dict[str, str]] = {"prompt": "messages", "logprobs": "top_logprobs"}
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=limits.MOST_MESSAGES)]
    logprobs: bool = False
    top_logprobs: Integer | None = None
    tools: Annotated[list[dict], BeforeValidator(request_fields.tools)] = []
    functions: Annotated[list[dict], BeforeValidator(request_fields.functions)] = []         # their old name
    tool_choice: unsupported(*request_fields.CALLS, why=request_fields.NO_FORM) = None
    function_call: unsupported(*request_fields.CALLS, why=request_fields.NO_FORM) = None
    echo: unsupported(False) = False
    add_special_tokens: unsupported(False) = False

    def requests(self, name: str, ready: Ready, render: Render) -> list[Request]:
        """One, of all messages in the model's template; by default it may fill the model's context."""
        if ready.template is None:
            raise Refused(400, "this model has no chat template; use /v1/completions")
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        limits.check_choices(1, self.n)
        context, logprobs = ready.info["context"], (self.top_logprobs or 0) if self.logprobs else None
        prompt = render_prompt(self.messages, self._offered(), ready, render)
        tokens, most = limits.encode(prompt, ready.text, context, begin=False), self.most
        if most is None:
            most = max(1, min(context - len(tokens), limits.most_tokens(context, self.n, logprobs)))
        return [self._request(name, tokens, most, logprobs, ready.text)]

    def _offered(self) -> list[dict] | None:
        """Tools that the model is shown: none where it may call none."""
        if self.tools and self.functions:
            raise Refused(400, "functions is the old name of tools; give one of them", "functions")
        choice = self.function_call if self.functions else self.tool_choice
        return None if choice == "none" else self.tools or self.functions or None


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

    `render(template, messages, text, tools)` makes a prompt of a chat.
    """
    try:
        requests = question.requests(name, ready, render)
        for request in requests:
            check(request, ready.info["context"], ready.info["vocab"])
            limits.check_memory(request, ready.info)
        limits.check_answer(requests, getattr(question, "echo", False), ready.info["context"])
        return requests
    except Unanswerable as why:
        raise Refused(400, str(why), question.to_blame(why.param), why.code) from None
    except Refused as why:
        raise Refused(why.status, str(why), question.to_blame(why.param), why.code) from why.__cause__
