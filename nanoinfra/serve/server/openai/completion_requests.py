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
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.errors import APIError
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.chat_messages import ChatMessage, RenderTemplate, render_chat_prompt
from nanoinfra.serve.server.openai.request_fields import (
    Int64,
    OpenAIBaseModel,
    UnsupportedFields,
    unsupported_field,
)

_LogitBias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(OpenAIBaseModel):
    """What a stream says beside the text."""
    include_usage: bool = False              # in a last chunk without choices
    continuous_usage_stats: bool = False     # and in every other


class BaseCompletionRequest(UnsupportedFields):
    """What both endpoints take. The defaults are OpenAI's."""
    spelled: ClassVar[dict[str, str]] = {}   # what a parameter of the engine's is called here
    model: str | None = None
    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None             # its new name, which clients send to both
    n: Int64 = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[str], BeforeValidator(request_fields.parse_stop_strings),
                    Field(max_length=request_limits.MAX_STOP_STRINGS)] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: Int64 = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, _LogitBias], BeforeValidator(request_fields.check_logit_bias_size)] = {}
    seed: Int64 | None = None              # null or -1: another each time
    ignore_eos: bool = False
    min_tokens: Int64 = 0
    stop_token_ids: Annotated[list[Int64], Field(max_length=request_limits.MAX_STOP_STRINGS)] = []
    cache_salt: Annotated[str, Field(max_length=request_limits.MAX_CACHE_SALT_CHARS)] = ""

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
            raise APIError(400, "a stop string is empty; leave it out", "stop")
        sampling = Sampling(self.temperature, max(0, self.top_k), self.top_p, self.min_p,
                            self.presence_penalty, self.frequency_penalty, self.repetition_penalty,
                            self.logit_bias, None if self.seed == -1 else self.seed)
        return Request(name, tokens, sampling, max_tokens, self.n, tuple(self.stop), self.ignore_eos,
                       logprobs, echo, self.cache_salt, self._stop_token_ids(text), self.min_tokens)

    def _stop_token_ids(self, text):
        """Those asked for, and of stop strings that are special tokens: no text ever shows these."""
        named = (text.backend.token_to_id(stop) for stop in self.stop)
        return (*self.stop_token_ids, *(token for token in named if token in text.special_ids))


_CHAT_ONLY_REASON = "tools are for /v1/chat/completions"


class CompletionRequest(BaseCompletionRequest):
    """The body of /v1/completions."""
    prompt: Annotated[list[Any], BeforeValidator(request_fields.parse_prompts),
                      Field(max_length=request_limits.MAX_PROMPTS_PER_REQUEST)]
    logprobs: Int64 | None = None
    echo: bool = False
    add_special_tokens: bool = True
    top_logprobs: unsupported_field(why="here logprobs is their number") = None
    tools: unsupported_field([], why=_CHAT_ONLY_REASON) = None
    functions: unsupported_field([], why=_CHAT_ONLY_REASON) = None
    tool_choice: unsupported_field(*request_fields.UNENFORCED_TOOL_CHOICES, why=_CHAT_ONLY_REASON) = None
    function_call: unsupported_field(*request_fields.UNENFORCED_TOOL_CHOICES, why=_CHAT_ONLY_REASON) = None

    def requests(self, name: str, ready: Ready, render: RenderTemplate) -> list[Request]:
        """One for each prompt."""
        request_limits.check_num_choices(len(self.prompt), self.n)
        context = ready.info["context"]
        most = 16 if self.most is None else self.most
        scored = self.echo and (self.logprobs is not None or most == 0)
        made, size = [], 0
        for i, given in enumerate(self.prompt):
            tokens = given if isinstance(given, list) else request_limits.tokenize_prompt(given, ready.text,
                                                                                          context,
                                                                         self.add_special_tokens)
            size += len(tokens)
            request_limits.check_total_prompt_tokens(size, context)
            made.append(self._request(f"{name}-{i}", tokens, most, self.logprobs, ready.text, scored))
        return made


class ChatCompletionRequest(BaseCompletionRequest):
    """The body of /v1/chat/completions. What the model says comes as text, calls of tools too."""
    spelled: ClassVar[dict[str, str]] = {"prompt": "messages", "logprobs": "top_logprobs"}
    messages: Annotated[list[ChatMessage], FailFast(),
                        Field(min_length=1, max_length=request_limits.MAX_MESSAGES)]
    logprobs: bool = False
    top_logprobs: Int64 | None = None
    tools: Annotated[list[dict], BeforeValidator(request_fields.parse_tools)] = []
    functions: Annotated[list[dict], BeforeValidator(request_fields.parse_legacy_functions)] = []         # their old name
    tool_choice: unsupported_field(*request_fields.UNENFORCED_TOOL_CHOICES,
                                   why=request_fields.NO_GUIDED_DECODING_REASON) = None
    function_call: unsupported_field(*request_fields.UNENFORCED_TOOL_CHOICES,
                                     why=request_fields.NO_GUIDED_DECODING_REASON) = None
    echo: unsupported_field(False) = False
    add_special_tokens: unsupported_field(False) = False

    def requests(self, name: str, ready: Ready, render: RenderTemplate) -> list[Request]:
        """One, of all messages in the model's template; by default it may fill the model's context."""
        if ready.template is None:
            raise APIError(400, "this model has no chat template; use /v1/completions")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        request_limits.check_num_choices(1, self.n)
        context, logprobs = ready.info["context"], (self.top_logprobs or 0) if self.logprobs else None
        prompt = render_chat_prompt(self.messages, self._offered(), ready, render)
        tokens, most = request_limits.tokenize_prompt(prompt, ready.text, context, begin=False), self.most
        if most is None:
            most = max(1,
                       min(context - len(tokens),
                           request_limits.default_max_tokens(context, self.n, logprobs)))
        return [self._request(name, tokens, most, logprobs, ready.text)]

    def _offered(self) -> list[dict] | None:
        """Tools that the model is shown: none where it may call none."""
        if self.tools and self.functions:
            raise APIError(400, "functions is the old name of tools; give one of them", "functions")
        choice = self.function_call if self.functions else self.tool_choice
        return None if choice == "none" else self.tools or self.functions or None


def parse_request_body(kind: type[BaseCompletionRequest], body: bytes) -> BaseCompletionRequest:
    """The body of an HTTP request. Raises Refused for one that is not as it must be."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False, include_context=False)
        where = ".".join(map(str, first["loc"]))
        also = f" (and {len(more)} more)" if more else ""
        says = first["msg"].removeprefix("Value error, ")
        raise APIError(400, f"{where}: {says}{also}" if where else says + also, where or None) from None


def build_engine_requests(question: BaseCompletionRequest, name: str, ready: Ready,
                          render: RenderTemplate = render_chat) -> list[Request]:
    """What the engine is asked. Raises Refused for what no engine with this model could answer.

    `render(template, messages, text, tools)` makes a prompt of a chat.
    """
    try:
        requests = question.requests(name, ready, render)
        for request in requests:
            check(request, ready.info["context"], ready.info["vocab"])
            request_limits.check_fits_kv_cache(request, ready.info)
        request_limits.check_response_size(requests, getattr(question, "echo", False), ready.info["context"])
        return requests
    except Unanswerable as why:
        raise APIError(400, str(why), question.to_blame(why.param), why.code) from None
    except APIError as why:
        raise APIError(why.status, str(why), question.to_blame(why.param), why.code) from why.__cause__
