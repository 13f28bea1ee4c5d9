"""Validators for fields of request bodies: several forms of a field become one, unknown ones are ignored.

Every parameter of OpenAI and vLLM is a field in completion_requests.py, or stands in the table of
unsupported fields here and is refused by name, or cannot change the answer and is ignored. Validators check
single fields: one of the whole body would make Python objects of the ignored fields too.
"""
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticUseDefault

from nanoinfra.serve.server import request_limits

NOOP_VALUES_OF_UNSUPPORTED_FIELDS = {        # {field: values that would change nothing}
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
UNENFORCED_TOOL_CHOICES = ["auto", "none"]   # of tool_choice: nothing is to be enforced
NO_GUIDED_DECODING_REASON = "nothing here holds a model to a form (no guided decoding)"
_TEXT_ONLY_REASON = "what the model writes, calls of tools too, comes as text"
_GUIDED_DECODING_FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex",
                           "guided_choice", "guided_grammar", "regex", "ebnf", "grammar", "json_schema")
_UNSUPPORTED_REASONS = {**dict.fromkeys(_GUIDED_DECODING_FIELDS, NO_GUIDED_DECODING_REASON),
                        "parallel_tool_calls": _TEXT_ONLY_REASON,
                        "reasoning_effort": "the model has no efforts to choose from",
                        "n_predict": "it is called max_tokens", "max_new_tokens": "it is called max_tokens",
                        "repeat_penalty": "it is called repetition_penalty"}


def unsupported_field(*noop_values: Any, reason: str = "") -> Any:
    """The type of a field that is not supported: only `noop_values`, which change nothing, are accepted."""
    def check(value):
        if value not in noop_values:
            instead = f", or give {noop_values[0]!r}" if noop_values else ""
            because = f": {reason}" if reason else ""
            raise ValueError(f"{_describe_value(value)} is not supported{because}; leave it out{instead}")
        return value
    return Annotated[Any, BeforeValidator(check)]


def parse_stop_strings(value: Any) -> list[str]:
    """The field `stop` as a list of texts. It may be one text, a list of texts, or null."""
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        raise ValueError("give a text or a list of texts")
    request_limits.check_stop_strings(texts := [text for text in value if text is not None])
    return texts


def parse_prompts(value: Any) -> list:
    """The field `prompt` as a list. It may be a text, a list of token ids, or a list of either."""
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    limit = request_limits.MAX_PROMPTS_PER_REQUEST
    if isinstance(value, list) and len(value) > limit:
        raise ValueError(f"{len(value)} prompts; give at most {limit} at once")
    if isinstance(value, list) and value and all(isinstance(each, str) or _is_token_ids(each)
                                                 for each in value):
        return value
    raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")


def _is_token_ids(value):
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def parse_message_content(value: Any) -> str | None:
    """The `content` of a message as one text, or None. It may be a list of text parts."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError('this model reads text alone; give parts as {"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in value)
    if value is not None and not isinstance(value, str):
        raise ValueError("give a text or a list of parts")
    return value


def parse_tools(value: Any) -> list[dict]:
    """The field `tools`, checked: functions only, and no `strict` schema, as there is no guided decoding."""
    if not isinstance(value, list) or len(value) > request_limits.MAX_TOOLS:
        raise ValueError(f"give a list of at most {request_limits.MAX_TOOLS} tools")
    for tool in value:
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            raise ValueError(f"a tool of type {_describe_value(kind)} is not supported; give functions alone")
        _check_function(tool.get("function"))
    return value


def parse_legacy_functions(value: Any) -> list[dict]:
    """The field `functions`, the old form of `tools`, as tools."""
    value = value if isinstance(value, list) else [value]
    return parse_tools([{"type": "function", "function": each} for each in value])


def _check_function(value):
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError('a function has no name; give {"name": "...", "parameters": {...}}')
    if not isinstance(value.get("parameters"), dict | None):
        raise ValueError(f"the parameters of the function {value['name']!r:.80} are no JSON schema")
    if value.get("strict"):
        raise ValueError(f"strict of the function {value['name']!r:.80}: {NO_GUIDED_DECODING_REASON}; "
                         "leave strict out")


def check_logit_bias_size(value: Any) -> Any:
    """Check the size of `logit_bias` before its entries are validated one by one."""
    if isinstance(value, dict) and len(value) > request_limits.MAX_LOGIT_BIASES:
        raise ValueError(f"{len(value)} tokens; give at most {request_limits.MAX_LOGIT_BIASES}")
    return value


class OpenAIBaseModel(BaseModel):
    """A pydantic model that ignores unknown fields and takes null as a field that was left out."""
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _without_nulls(cls, value):
        if value is None:
            raise PydanticUseDefault
        return value


Int64 = Annotated[int, Field(ge=-2 ** 63, lt=2 ** 63)]       # integers in JSON may have 4,300 digits
UnsupportedFields = pydantic.create_model("UnsupportedFields", __base__=OpenAIBaseModel, **{
    name: (unsupported_field(*noop_values, reason=_UNSUPPORTED_REASONS.get(name, "")), None)
    for name, noop_values in NOOP_VALUES_OF_UNSUPPORTED_FIELDS.items()})


def _describe_value(value):
    return f"{value!r:.80}" if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
