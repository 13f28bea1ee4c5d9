"""Every parameter of OpenAI's and vLLM's is followed, refused by name, or known to change no answer."""
import json

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats

from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    parse_request_body,
)
from nanoinfra.serve.server.openai.request_fields import NOOP_VALUES_OF_UNSUPPORTED_FIELDS
from tests.serve.test_completion_requests import HI, UNSUPPORTED, asked

OPENAI = {CompletionRequest: completions.CompletionCreateParamsNonStreaming.__annotations__,
          ChatCompletionRequest: chats.CompletionCreateParamsNonStreaming.__annotations__}
VLLM = """add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    chat_template_kwargs continue_final_message documents echo guided_choice guided_decoding_backend
    guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos include_reasoning
    include_stop_str_in_output kv_transfer_params length_penalty logits_processors media_io_kwargs min_p
    min_tokens mm_processor_kwargs priority prompt_embeds prompt_logprobs repetition_penalty request_id
    return_token_ids return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens
    stop_token_ids structured_outputs top_k truncate_prompt_tokens use_beam_search vllm_xargs""".split()
BODIES = {CompletionRequest: {"prompt": "ab"}, ChatCompletionRequest: {"messages": HI}}
ASKED = {                                    # what the engine is asked otherwise
    "max_tokens": 3, "max_completion_tokens": 3, "n": 2, "stop": "x", "temperature": 0.5, "top_p": 0.5,
    "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1,
    "seed": 7, "logit_bias": {"5": 1}, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7],
    "cache_salt": "mine"}
IGNORED_FIELDS = {                           # what changes no answer: for bookkeeping, caching, speed, media
    "user", "metadata", "store", "service_tier", "safety_identifier", "prediction", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "request_id", "spaces_between_special_tokens",
    "guided_decoding_backend", "guided_whitespace_pattern", "mm_processor_kwargs", "media_io_kwargs"}
ALONE = {CompletionRequest: {"prompt": "abc", "logprobs": 2},
         ChatCompletionRequest: {"messages": [*HI, *HI], "logprobs": True}}
SAID = {                                     # what is said otherwise, or to whom
    "model": "m", "stream": True, "stream_options": {"include_usage": True}}
LATER = {CompletionRequest: {"echo": True, "add_special_tokens": False},
         ChatCompletionRequest: {"top_logprobs": 2}}
TOOLS = {"type": "function", "function": {"name": "f", "strict": True}}
WRONG = {CompletionRequest: {"top_logprobs": 2, "tools": [TOOLS], "functions": [{"name": "f"}],
                             "tool_choice": "required", "function_call": {"name": "f"}},
         ChatCompletionRequest: {"tools": [TOOLS], "functions": [{"name": "f", "strict": True}], "echo": True,
                                 "add_special_tokens": True,
                                 "tool_choice": {"type": "function", "function": {"name": "f"}},
                                 "function_call": {"name": "f"}}}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_every_parameter_is_followed_refused_or_changes_nothing(kind):
    followed = ASKED.keys() | ALONE[kind].keys() | SAID.keys() | LATER[kind].keys()
    refused = NOOP_VALUES_OF_UNSUPPORTED_FIELDS.keys() | WRONG[kind].keys()
    assert not followed & IGNORED_FIELDS
    assert not NOOP_VALUES_OF_UNSUPPORTED_FIELDS.keys() & (followed | IGNORED_FIELDS)
    assert {*OPENAI[kind], *VLLM} <= followed | refused | IGNORED_FIELDS
    assert kind.model_fields.keys() == (followed | refused)


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_what_is_followed_changes_what_is_asked(kind):
    plain, body = asked(kind, **BODIES[kind]), BODIES[kind]
    for name, value in {**ASKED, **ALONE[kind]}.items():
        assert asked(kind, **{**body, name: value}) != plain, name
    for name, value in {**SAID, **LATER[kind]}.items():
        got = parse_request_body(kind, json.dumps({**body, name: value, "logprobs": 1}).encode())
        assert getattr(got, name) != getattr(parse_request_body(kind, json.dumps(body).encode()), name), name


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_what_is_not_followed_is_refused_by_its_name(kind):
    for name, value in {**UNSUPPORTED, **WRONG[kind]}.items():
        with pytest.raises(APIError, match=f"^{name}: ") as refused:
            asked(kind, **BODIES[kind], **{name: value})
        assert (refused.value.status_code, refused.value.param) == (400, name)


def test_what_cannot_be_enforced_says_why():
    for name in ("response_format", "tool_choice", "tools", "guided_json"):
        with pytest.raises(APIError, match=r"nothing here holds a model to a form \(no guided decoding\)"):
            asked(ChatCompletionRequest, messages=HI,
                  **{name: {**UNSUPPORTED, **WRONG[ChatCompletionRequest]}[name]})


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_values_that_change_nothing_are_taken(kind):
    plain = asked(kind, **BODIES[kind])
    some = {name: values[0] for name, values in NOOP_VALUES_OF_UNSUPPORTED_FIELDS.items() if values}
    unread = dict.fromkeys(IGNORED_FIELDS, "x")
    choices = {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none"}
    assert asked(kind, **BODIES[kind], **some, **unread, **choices) == plain
    assert asked(kind, **BODIES[kind], seed=-1) == plain                 # as vLLM: another each time
    assert plain[0].sampling_params.seed is None
