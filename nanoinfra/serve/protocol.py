"""What clients of OpenAI's API send to its two endpoints, and what the engine is asked then.

Taken from what real clients send. A null means the default; a field that is not known is let pass; one that
is known, not supported, and would change the answer is refused. Which numbers are possible the engine's own
check says (requests.py).
"""
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from nanoinfra.model.text import render_chat
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.loop import Ready
from nanoinfra.serve.requests import Request, Sampling, check

MOST_PROMPTS = 1024                          # in one HTTP request
MOST_STOPS = 64

HARMLESS = {                                 # what is not supported, and the values that change nothing
    "best_of": [1], "suffix": [""], "response_format": [{"type": "text"}], "tool_choice": ["auto", "none"],
    "function_call": ["auto", "none"], "modalities": [["text"]], "audio": [], "min_tokens": [0],
    "use_beam_search": [False], "length_penalty": [1], "stop_token_ids": [[]], "bad_words": [[]],
    "allowed_token_ids": [], "prompt_logprobs": [], "truncate_prompt_tokens": [], "guided_json": [],
    "guided_regex": [], "guided_choice": [], "guided_grammar": [], "structured_outputs": [],
    "continue_final_message": [False], "add_generation_prompt": [True], "chat_template": [],
    "chat_template_kwargs": [{}], "documents": [[]], "skip_special_tokens": [True],
    "include_stop_str_in_output": [False], "prompt_embeds": [], "web_search_options": []}


def _texts(given):
    """A text, or several, or null for none: a list."""
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str | None) for text in given):
        raise ValueError("give a text or a list of texts")
    return [text for text in given if text is not None]


def _prompts(given):
    """A text, token ids, or a list of either: a list."""
    if isinstance(given, str) or _ids(given):
        return [given]
    if isinstance(given, list) and given and all(isinstance(each, str) or _ids(each) for each in given):
        return given
    raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")


def _ids(given):
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)


def _content(given):
    """A text, or the texts of a list of parts."""
    if isinstance(given, list):
        for part in given:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError('this model reads text alone; give parts as {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in given)
    if given is not None and not isinstance(given, str):
        raise ValueError("give a text or a list of parts")
    return given or ""


class Lenient(BaseModel):
    """Fields beyond those that are known pass; null means that a field was left out."""
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given):
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given


class StreamOptions(Lenient):
    """What a stream says beside the text."""
    include_usage: bool = False              # in a last chunk without choices
    continuous_usage_stats: bool = False     # and in every other


class Question(Lenient):
    """What both endpoints take. The defaults are OpenAI's."""
    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: Annotated[list[str], BeforeValidator(_texts), Field(max_length=MOST_STOPS)] = []
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    seed: Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)] | None = None
    ignore_eos: bool = False
    cache_salt: str = ""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, given):
        for name, values in HARMLESS.items():
            value = given.get(name) if isinstance(given, dict) else None
            if value is not None and value not in values:
                instead = f", or give {values[0]!r}" if values else ""
                raise ValueError(f"{name} = {str(value)[:80]} is not supported; leave it out{instead}")
        return given

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
    prompt: Annotated[list[Any], BeforeValidator(_prompts), Field(max_length=MOST_PROMPTS)]
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    def requests(self, name: str, ready: Ready) -> list[Request]:
        """One for each prompt."""
        most = 16 if self.max_tokens is None else self.max_tokens
        tokens = [each if isinstance(each, list) else ready.text.encode(each, self.add_special_tokens)
                  for each in self.prompt]
        scored = self.echo and (self.logprobs is not None or most == 0)
        return [self._request(f"{name}-{i}", each, most, self.logprobs, scored)
                for i, each in enumerate(tokens)]


class Message(Lenient):
    """One turn of a chat."""
    role: str
    content: Annotated[str, BeforeValidator(_content)] = ""


class Chat(Question):
    """The body of /v1/chat/completions."""
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def requests(self, name: str, ready: Ready) -> list[Request]:
        """One, of all messages in the model's template; by default it may fill the model's context."""
        if ready.template is None:
            raise Refused(400, "this model has no chat template; use /v1/completions")
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        tokens = ready.text.encode(self._rendered(ready), begin=False)
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        most = max(1, ready.info["context"] - len(tokens)) if most is None else most
        return [self._request(name, tokens, most, (self.top_logprobs or 0) if self.logprobs else None)]

    def _rendered(self, ready):
        messages = [message.model_dump() for message in self.messages]
        try:
            return render_chat(ready.template, messages, ready.text)
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


def requests_of(question: Question, name: str, ready: Ready) -> list[Request]:
    """What the engine is asked. Raises Refused for what no engine with this model could answer."""
    requests = question.requests(name, ready)
    for request in requests:
        try:
            check(request, ready.info["context"], ready.info["vocab"])
        except ValueError as error:
            raise Refused(400, str(error)) from None
    return requests
