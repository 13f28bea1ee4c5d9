"""Request bodies of /v1/completions and /v1/chat/completions, and the engine requests made of them.

The fields are OpenAI's and vLLM's. A null means the default. An unknown field is ignored; a known field that
is not supported and would change the answer is refused by name (request_fields.py). The engine checks the
ranges of values (engine/request_and_output.py), request_limits.py the sizes; chat_messages.py renders chats.
"""
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field, ValidationError

from nanoinfra.model.tokenizer import Tokenizer, apply_chat_template
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import InvalidRequest, Request, SamplingParams, check_request
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai import request_fields
from nanoinfra.serve.server.openai.chat_messages import ChatMessage, RenderTemplate, render_chat_prompt
from nanoinfra.serve.server.openai.request_fields import (
    NO_GUIDED_DECODING_REASON,
    UNENFORCED_TOOL_CHOICES,
    Int64,
    OpenAIBaseModel,
    UnsupportedFields,
    unsupported_field,
)

_LogitBias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(OpenAIBaseModel):
    """What a stream contains besides the text."""
    include_usage: bool = False              # in a last chunk, whose list of choices is empty
    continuous_usage_stats: bool = False     # also in every other chunk


class BaseCompletionRequest(UnsupportedFields):
    """The fields that completions and chat completions share, with OpenAI's defaults."""
    client_field_names: ClassVar[dict[str, str]] = {}        # {engine parameter: field of this body}
    model: str | None = None
    max_tokens: Int64 | None = None
    max_completion_tokens: Int64 | None = None               # the newer name; clients send it to both
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
    seed: Int64 | None = None                # null or -1: a new one each time
    ignore_eos: bool = False
    min_tokens: Int64 = 0
    stop_token_ids: Annotated[list[Int64], Field(max_length=request_limits.MAX_STOP_STRINGS)] = []
    cache_salt: Annotated[str, Field(max_length=request_limits.MAX_CACHE_SALT_CHARS)] = ""

    @property
    def requested_max_tokens(self) -> int | None:
        """The maximum number of new tokens that the client asks for; None if it asks for none."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def client_field_name(self, engine_param: str | None) -> str | None:
        """The field of this body for a parameter of the engine, to name in an error."""
        if engine_param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return self.client_field_names.get(engine_param, engine_param)

    def _engine_request(self, request_id, tokens, max_tokens, logprobs, tokenizer: Tokenizer,
                        echo=False) -> Request:
        if "" in self.stop:
            raise APIError(400, "a stop string is empty; leave it out", "stop")
        sampling = SamplingParams(self.temperature, max(0, self.top_k), self.top_p, self.min_p,
                                  self.presence_penalty, self.frequency_penalty, self.repetition_penalty,
                                  self.logit_bias, None if self.seed == -1 else self.seed)
        return Request(request_id, tokens, sampling, max_tokens, self.n, tuple(self.stop), self.ignore_eos,
                       logprobs, echo, self.cache_salt, self._stop_token_ids(tokenizer), self.min_tokens)

    def _stop_token_ids(self, tokenizer):
        """The stop_token_ids, and the ids of stop strings that are special tokens, which no text contains."""
        named = (tokenizer.backend_tokenizer.token_to_id(stop) for stop in self.stop)
        return (*self.stop_token_ids, *(token for token in named if token in tokenizer.special_token_ids))


_CHAT_ONLY_REASON = "tools are for /v1/chat/completions"


class CompletionRequest(BaseCompletionRequest):
    """The body of POST /v1/completions."""
    prompt: Annotated[list[Any], BeforeValidator(request_fields.parse_prompts),
                      Field(max_length=request_limits.MAX_PROMPTS_PER_REQUEST)]
    logprobs: Int64 | None = None
    echo: bool = False
    add_special_tokens: bool = True
    top_logprobs: unsupported_field(reason="here logprobs is their number") = None
    tools: unsupported_field([], reason=_CHAT_ONLY_REASON) = None
    functions: unsupported_field([], reason=_CHAT_ONLY_REASON) = None
    tool_choice: unsupported_field(*UNENFORCED_TOOL_CHOICES, reason=_CHAT_ONLY_REASON) = None
    function_call: unsupported_field(*UNENFORCED_TOOL_CHOICES, reason=_CHAT_ONLY_REASON) = None

    def to_engine_requests(self, request_id: str, engine_ready: EngineReady,
                           render_template: RenderTemplate) -> list[Request]:
        """One engine request for each prompt. Raises APIError."""
        request_limits.check_num_choices(len(self.prompt), self.n)
        context = engine_ready.info["context"]
        max_tokens = 16 if self.requested_max_tokens is None else self.requested_max_tokens
        scores_prompt = self.echo and (self.logprobs is not None or max_tokens == 0)
        engine_requests, total = [], 0
        for i, prompt in enumerate(self.prompt):
            tokens = prompt if isinstance(prompt, list) else request_limits.tokenize_prompt(
                prompt, engine_ready.tokenizer, context, self.add_special_tokens)
            total += len(tokens)
            request_limits.check_total_prompt_tokens(total, context)
            engine_requests.append(self._engine_request(f"{request_id}-{i}", tokens, max_tokens,
                                                        self.logprobs, engine_ready.tokenizer, scores_prompt))
        return engine_requests


class ChatCompletionRequest(BaseCompletionRequest):
    """The body of POST /v1/chat/completions. The model's tool calls come back as plain text."""
    client_field_names: ClassVar[dict[str, str]] = {"prompt": "messages", "logprobs": "top_logprobs"}
    messages: Annotated[list[ChatMessage], FailFast(),
                        Field(min_length=1, max_length=request_limits.MAX_MESSAGES)]
    logprobs: bool = False
    top_logprobs: Int64 | None = None
    tools: Annotated[list[dict], BeforeValidator(request_fields.parse_tools)] = []
    functions: Annotated[list[dict], BeforeValidator(request_fields.parse_legacy_functions)] = []
    tool_choice: unsupported_field(*UNENFORCED_TOOL_CHOICES, reason=NO_GUIDED_DECODING_REASON) = None
    function_call: unsupported_field(*UNENFORCED_TOOL_CHOICES, reason=NO_GUIDED_DECODING_REASON) = None
    echo: unsupported_field(False) = False
    add_special_tokens: unsupported_field(False) = False

    def to_engine_requests(self, request_id: str, engine_ready: EngineReady,
                           render_template: RenderTemplate) -> list[Request]:
        """One engine request, whose prompt is the messages in the model's chat template. Raises APIError.

        Without max_tokens the answer may fill the context.
        """
        if engine_ready.chat_template is None:
            raise APIError(400, "this model has no chat template; use /v1/completions")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        request_limits.check_num_choices(1, self.n)
        context, max_tokens = engine_ready.info["context"], self.requested_max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        prompt = render_chat_prompt(self.messages, self._tools_to_show(), engine_ready, render_template)
        tokens = request_limits.tokenize_prompt(prompt, engine_ready.tokenizer, context,
                                                add_special_tokens=False)
        if max_tokens is None:
            largest = request_limits.default_max_tokens(context, self.n, logprobs)
            max_tokens = max(1, min(context - len(tokens), largest))
        return [self._engine_request(request_id, tokens, max_tokens, logprobs, engine_ready.tokenizer)]

    def _tools_to_show(self) -> list[dict] | None:
        """The tools to show to the model; None if it may call none."""
        if self.tools and self.functions:
            raise APIError(400, "functions is the old name of tools; give one of them", "functions")
        choice = self.function_call if self.functions else self.tool_choice
        return None if choice == "none" else self.tools or self.functions or None


def parse_request_body(request_type: type[BaseCompletionRequest], body: bytes) -> BaseCompletionRequest:
    """Parse and validate the JSON body of an HTTP request. Raises APIError (400) for an invalid one."""
    try:
        return request_type.model_validate_json(body)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_input=False, include_context=False)
        where = ".".join(map(str, first["loc"]))
        also = f" (and {len(more)} more)" if more else ""
        message = first["msg"].removeprefix("Value error, ")
        raise APIError(400, f"{where}: {message}{also}" if where else message + also, where or None) from None


def build_engine_requests(request: BaseCompletionRequest, request_id: str, engine_ready: EngineReady,
                          render_template: RenderTemplate = apply_chat_template) -> list[Request]:
    """The engine requests of a parsed body. Raises APIError for a request that this model cannot answer.

    `render_template(chat_template, messages, tokenizer, tools)` makes the prompt of a chat.
    """
    try:
        engine_requests = request.to_engine_requests(request_id, engine_ready, render_template)
        for each in engine_requests:
            check_request(each, engine_ready.info["context"], engine_ready.info["vocab"])
            request_limits.check_fits_kv_cache(each, engine_ready.info)
        request_limits.check_response_size(engine_requests, getattr(request, "echo", False),
                                           engine_ready.info["context"])
        return engine_requests
    except InvalidRequest as error:
        raise APIError(400, str(error), request.client_field_name(error.param), error.code) from None
    except APIError as error:
        param = request.client_field_name(error.param)
        raise APIError(error.status_code, str(error), param, error.code) from error.__cause__
