"""How the fields of a body are read: what has several forms becomes one, what nobody knows is dropped.

Every parameter of OpenAI's and of vLLM's is a field of protocol.py's, or stands in a table here: refused by
name where it would change the answer, left unread where it cannot. Validators look at single fields alone:
one of the whole body would make Python objects of what is dropped.
"""
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticUseDefault

from nanoinfra.serve.server import limits

HARMLESS = {                                 # what is not supported, and the values that change nothing
    "best_of": [1], "suffix": [""], "response_format": [{"type": "text"}], "modalities": [["text"]],
    "audio": [], "use_beam_search": [False], "length_penalty": [1], "bad_words": [[]],
    "allowed_token_ids": [], "prompt_logprobs": [], "truncate_prompt_tokens": [], "guided_json": [],
    "guided_regex": [], "guided_choice": [], "guided_grammar": [], "structured_outputs": [], "regex": [],
    "ebnf": [], "grammar": [], "json_schema": [],
    "continue_final_message": [False], "add_generation_prompt": [True], "chat_template": [],
    "chat_template_kwargs": [{}], "documents": [[]], "skip_special_tokens": [True],
    "include_stop_str_in_output": [False], "prompt_embeds": [], "web_search_options": [],
    "parallel_tool_calls": [True], "reasoning_effort": [], "reasoning": [], "verbosity": ["medium"],
    "moderation": [], "include_reasoning": [True], "thinking_token_budget": [], "repetition_detection": [],
    "logits_processors": [[]], "return_tokens_as_token_ids": [False], "return_token_ids": [False],
    "priority": [0], "kv_transfer_params": [], "vllm_xargs": [{}], "n_predict": [], "max_new_tokens": [],
    "typical_p": [1], "repeat_penalty": [1], "mirostat": [0], "dry_multiplier": [0], "xtc_probability": [0]}
UNREAD = {                                   # what changes no answer: for bookkeeping, caching, speed, media
    "user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "request_id", "spaces_between_special_tokens",
    "guided_decoding_backend", "guided_whitespace_pattern", "mm_processor_kwargs", "media_io_kwargs"}
CALLS = ["auto", "none"]                     # values of tool_choice that ask for nothing to be enforced
NO_FORM = "nothing here holds a model to a form (no guided decoding)"
TEXT_ALONE = "what the model writes, calls of tools too, comes as text"
FORMS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
         "guided_grammar", "regex", "ebnf", "grammar", "json_schema")
REASONS = {**dict.fromkeys(FORMS, NO_FORM),
           "parallel_tool_calls": TEXT_ALONE, "reasoning_effort": "the model has no efforts to choose from",
           "n_predict": "it is called max_tokens", "max_new_tokens": "it is called max_tokens",
           "repeat_penalty": "it is called repetition_penalty"}


def unsupported(*values: Any, why: str = "") -> Any:
    """The type of a field of which none but `values`, which change nothing, is taken."""
    def check(given):
        if given not in values:
            instead = f", or give {values[0]!r}" if values else ""
            raise ValueError(f"{_said(given)} is not supported{': ' * bool(why)}{why}; leave it out{instead}")
        return given
    return Annotated[Any, BeforeValidator(check)]


def texts(given: Any) -> list[str]:
    """A text, or several, or null for none: a list."""
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str | None) for text in given):
        raise ValueError("give a text or a list of texts")
    limits.check_stops(texts := [text for text in given if text is not None])
    return texts


def prompts(given: Any) -> list:
    """A text, token ids, or a list of either: a list."""
    if isinstance(given, str) or _ids(given):
        return [given]
    if isinstance(given, list) and len(given) > limits.MOST_PROMPTS:
        raise ValueError(f"{len(given)} prompts; give at most {limits.MOST_PROMPTS} at once")
    if isinstance(given, list) and given and all(isinstance(each, str) or _ids(each) for each in given):
        return given
    raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")


def _ids(given):
    return isinstance(given, list) and bool(given) and all(type(each) is int for each in given)


def content(given: Any) -> str | None:
    """A text, or the texts of a list of parts, or null."""
    if isinstance(given, list):
        for part in given:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError('this model reads text alone; give parts as {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in given)
    if given is not None and not isinstance(given, str):
        raise ValueError("give a text or a list of parts")
    return given


def tools(given: Any) -> list[dict]:
    """OpenAI's tools, functions alone, with nothing that would have to be enforced."""
    if not isinstance(given, list) or len(given) > limits.MOST_TOOLS:
        raise ValueError(f"give a list of at most {limits.MOST_TOOLS} tools")
    for tool in given:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise ValueError(f"a tool of type {_said(kind)} is not supported; give functions alone")
        _check_function(tool.get("function"))
    return given


def functions(given: Any) -> list[dict]:
    """What `tools` were called before, as tools."""
    given = given if isinstance(given, list) else [given]
    return tools([{"type": "function", "function": each} for each in given])


def _check_function(given):
    if not isinstance(given, dict) or not isinstance(given.get("name"), str) or not given["name"]:
        raise ValueError('a function has no name; give {"name": "...", "parameters": {...}}')
    if not isinstance(given.get("parameters"), dict | None):
        raise ValueError(f"the parameters of the function {given['name']!r:.80} are no JSON schema")
    if given.get("strict"):
        raise ValueError(f"strict of the function {given['name']!r:.80}: {NO_FORM}; leave strict out")


def biases(given: Any) -> Any:
    """No more of them than may be: checked before each is read, and each wrong one reported."""
    if isinstance(given, dict) and len(given) > limits.MOST_BIASES:
        raise ValueError(f"{len(given)} tokens; give at most {limits.MOST_BIASES}")
    return given


class Lenient(BaseModel):
    """Fields beyond those that are known are dropped; null means that a field was left out."""
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _without_nulls(cls, given):
        if given is None:
            raise PydanticUseDefault
        return given


Integer = Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)]     # JSON's may have 4,300 digits
Unsupported = pydantic.create_model("Unsupported", __base__=Lenient, **{
    name: (unsupported(*values, why=REASONS.get(name, "")), None) for name, values in HARMLESS.items()})


def _said(given):
    return f"{given!r:.80}" if isinstance(given, str | int | float | None) else f"a {type(given).__name__}"
