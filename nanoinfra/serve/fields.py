"""How the fields of a body are read: what has several forms becomes one, what nobody knows is dropped.

Validators look at single fields alone: one of the whole body would make Python objects of what is dropped.
"""
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticUseDefault

from nanoinfra.serve import limits

HARMLESS = {                                 # what is not supported, and the values that change nothing
    "best_of": [1], "suffix": [""], "response_format": [{"type": "text"}], "tool_choice": ["auto", "none"],
    "function_call": ["auto", "none"], "modalities": [["text"]], "audio": [], "min_tokens": [0],
    "use_beam_search": [False], "length_penalty": [1], "stop_token_ids": [[]], "bad_words": [[]],
    "allowed_token_ids": [], "prompt_logprobs": [], "truncate_prompt_tokens": [], "guided_json": [],
    "guided_regex": [], "guided_choice": [], "guided_grammar": [], "structured_outputs": [],
    "continue_final_message": [False], "add_generation_prompt": [True], "chat_template": [],
    "chat_template_kwargs": [{}], "documents": [[]], "skip_special_tokens": [True],
    "include_stop_str_in_output": [False], "prompt_embeds": [], "web_search_options": []}


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


def content(given: Any) -> str:
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
Known = pydantic.create_model("Known", __base__=Lenient, **{name: (Any, None) for name in HARMLESS})


class Unsupported(Known):
    """Refuses what it would answer wrongly."""

    @field_validator(*HARMLESS, mode="before")
    @classmethod
    def _supported(cls, given, info):
        values = HARMLESS[info.field_name]
        if given is not None and given not in values:
            instead = f", or give {values[0]!r}" if values else ""
            raise ValueError(f"{_said(given)} is not supported; leave it out{instead}")
        return given


def _said(given):
    return f"{given!r:.80}" if isinstance(given, str | int | float) else f"a {type(given).__name__}"
