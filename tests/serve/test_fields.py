"""Every parameter of OpenAI's and vLLM's is followed, refused by name, or known to change no answer."""
import json

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats

from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.completion_requests import Chat, Completion, read
from nanoinfra.serve.server.openai.request_fields import HARMLESS, UNREAD
from tests.serve.test_protocol import HI, UNSUPPORTED, asked

OPENAI = {Completion: completions.CompletionCreateParamsNonStreaming.__annotations__,
          Chat: chats.CompletionCreateParamsNonStreaming.__annotations__}
VLLM = """add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    chat_template_kwargs continue_final_message documents echo guided_choice guided_decoding_backend
    guided_grammar guided_json guided_regex guided_whitespace_pattern ignore_eos include_reasoning
    include_stop_str_in_output kv_transfer_params length_penalty logits_processors media_io_kwargs min_p
    min_tokens mm_processor_kwargs priority prompt_embeds prompt_logprobs repetition_penalty request_id
    return_token_ids return_tokens_as_token_ids skip_special_tokens spaces_between_special_tokens
    stop_token_ids structured_outputs top_k truncate_prompt_tokens use_beam_search vllm_xargs""".split()
BODIES = {Completion: {"prompt": "ab"}, Chat: {"messages": HI}}
ASKED = {                                    # what the engine is asked otherwise
    "max_tokens": 3, "max_completion_tokens": 3, "n": 2, "stop": "x", "temperature": 0.5, "top_p": 0.5,
    "top_k": 5, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.1,
    "seed": 7, "logit_bias": {"5": 1}, "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [7],
    "cache_salt": "mine"}
ALONE = {Completion: {"prompt": "abc", "logprobs": 2}, Chat: {"messages": [*HI, *HI], "logprobs": True}}
SAID = {                                     # what is said otherwise, or to whom
    "model": "m", "stream": True, "stream_options": {"include_usage": True}}
LATER = {Completion: {"echo": True, "add_special_tokens": False}, Chat: {"top_logprobs": 2}}
TOOLS = {"type": "function", "function": {"name": "f", "strict": True}}
WRONG = {Completion: {"top_logprobs": 2, "tools": [TOOLS], "functions": [{"name": "f"}],
                      "tool_choice": "required", "function_call": {"name": "f"}},
         Chat: {"tools": [TOOLS], "functions": [{"name": "f", "strict": True}], "echo": True,
                "add_special_tokens": True, "tool_choice": {"type": "function", "function": {"name": "f"}},
                "function_call": {"name": "f"}}}


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_every_parameter_is_followed_refused_or_changes_nothing(kind):
    followed = ASKED.keys() | ALONE[kind].keys() | SAID.keys() | LATER[kind].keys()
    refused = HARMLESS.keys() | WRONG[kind].keys()
    assert not followed & UNREAD and not HARMLESS.keys() & (followed | UNREAD)
    assert {*OPENAI[kind], *VLLM} <= followed | refused | UNREAD
    assert kind.model_fields.keys() == (followed | refused)


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_what_is_followed_changes_what_is_asked(kind):
    plain, body = asked(kind, **BODIES[kind]), BODIES[kind]
    for name, value in {**ASKED, **ALONE[kind]}.items():
        assert asked(kind, **{**body, name: value}) != plain, name
    for name, value in {**SAID, **LATER[kind]}.items():
        got = read(kind, json.dumps({**body, name: value, "logprobs": 1}).encode())
        assert getattr(got, name) != getattr(read(kind, json.dumps(body).encode()), name), name


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_what_is_not_followed_is_refused_by_its_name(kind):
    for name, value in {**UNSUPPORTED, **WRONG[kind]}.items():
        with pytest.raises(Refused, match=f"^{name}: ") as refused:
            asked(kind, **BODIES[kind], **{name: value})
        assert (refused.value.status, refused.value.param) == (400, name)


def test_what_cannot_be_enforced_says_why():
    for name in ("response_format", "tool_choice", "tools", "guided_json"):
        with pytest.raises(Refused, match=r"nothing here holds a model to a form \(no guided decoding\)"):
            asked(Chat, messages=HI, **{name: {**UNSUPPORTED, **WRONG[Chat]}[name]})


@pytest.mark.parametrize("kind", [Completion, Chat])
def test_values_that_change_nothing_are_taken(kind):
    plain = asked(kind, **BODIES[kind])
    some = {name: values[0] for name, values in HARMLESS.items() if values}
    unread = dict.fromkeys(UNREAD, "x")
    choices = {"tools": [], "tool_choice": "auto", "functions": [], "function_call": "none"}
    assert asked(kind, **BODIES[kind], **some, **unread, **choices) == plain
    assert asked(kind, **BODIES[kind], seed=-1) == plain                 # as vLLM: another each time
    assert plain[0].sampling.seed is None
