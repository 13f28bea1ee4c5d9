"""Known-wrong limits of a request: texts tokenized that cannot fit, stop strings and answers without end.

`ask` reads one body as the server does, up to what the engine would be asked; a mutant of the library is
patched in meanwhile.
"""
import json

from pydantic import ConfigDict

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server import request_limits
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    CompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from nanoinfra.serve.server.openai.completion_responses import ChatCompletionResponse, CompletionResponse

CONTEXT = 64
requests = Check("limits of a request")


class Letters:
    """A tokenizer of single letters that counts them."""

    def __init__(self):
        self.seen = 0

    def encode_batch(self, texts, add_special_tokens):
        self.seen += sum(map(len, texts))
        return [type("Encoding", (), {"ids": [ord(letter) % 90 for letter in text]}) for text in texts]

    def decode(self, ids, skip_special_tokens):
        return "a" * len(ids)

    def get_vocab(self):
        return {"a": 0, "abcd": 1}

    def get_added_tokens_decoder(self):
        return {}

    def token_to_id(self, text):
        return None


def ask(kind, **body):
    """(why it was refused, or None; characters that were tokenized; chats rendered; fields kept)."""
    letters, rendered, kept = Letters(), [], ()
    ready = EngineReady({"context": CONTEXT, "vocab": 97}, Tokenizer(letters), "template")
    try:
        question = parse_request_body(kind, json.dumps(body).encode())
        kept = question.model_extra or ()
        asked = build_engine_requests(question, "r", ready, lambda *chat: rendered.append(chat) or "abc")
        form = ChatCompletionResponse if kind is ChatCompletionRequest else CompletionResponse
        form(question, "r", "m", asked, ready.tokenizer)
    except APIError as refused:
        return str(refused), letters.seen, len(rendered), kept
    return None, letters.seen, len(rendered), kept


def _refuses(name, kind, body, says):
    @requests.criterion(name, "property")
    def _(subject):
        why, *_ = subject(kind, **body)
        if says not in (why or ""):
            raise CriterionNotMet(f"{str(body)[:80]}: want a refusal with {says!r}, got {why!r}")
    return name


@requests.criterion("a text that no context spells is not tokenized", "property")
def _(subject):
    why, seen, _, _ = subject(CompletionRequest, prompt="a" * 5 * CONTEXT)
    if seen or not why:
        raise CriterionNotMet(f"a prompt of {5 * CONTEXT} characters, at most {4 * CONTEXT} fit: {seen} were "
                              "tokenized")


@requests.criterion("a chat that no context spells is not rendered", "property")
def _(subject):
    why, _, rendered, _ = subject(ChatCompletionRequest,
                                  messages=[{"role": "user", "content": "a" * 5 * CONTEXT}])
    if rendered or not why:
        raise CriterionNotMet(f"a message of {5 * CONTEXT} characters was rendered; "
                              f"at most {4 * CONTEXT} fit")


@requests.criterion("what nobody knows is dropped", "property")
def _(subject):
    *_, kept = subject(CompletionRequest, prompt="a", max_tokens=1, unheard_of=[1])
    if kept:
        raise CriterionNotMet(f"a field that nobody knows is kept: {kept}")


PROMPTS = _refuses("prompts are few", CompletionRequest, {"prompt": ["a"] * 2000, "max_tokens": 1},
                   "2000 prompts")
CHOICES = _refuses("choices are few", CompletionRequest, {"prompt": ["a"] * 99, "n": 64, "max_tokens": 1},
                   "choices")
TOTAL = _refuses("prompts are short together", CompletionRequest,
                 {"prompt": [[1] * 60] * 100, "max_tokens": 1}, "tokens in one request")
SAID = _refuses("an answer has few tokens", CompletionRequest, {"prompt": ["a"] * 99, "max_tokens": 60},
                "come to")
PROBS = _refuses("an answer has few log-probabilities", CompletionRequest,
                 {"prompt": [1] * 30, "n": 64, "echo": True, "logprobs": 90, "max_tokens": 1}, "log-probabil")
STOPS = _refuses("stop strings are short", CompletionRequest, {"prompt": "a", "stop": "a" * 5000},
                 "stop strings")
BIASES = _refuses("biases are few", CompletionRequest,
                  {"prompt": "a", "logit_bias": {f"w{i}": 1 for i in range(2000)}}, "2000 tokens; give")
DIGITS = _refuses("numbers have few digits", CompletionRequest, {"prompt": "a", "n": int("7" * 400)},
                  "less than")
CALLS = _refuses("a message has few calls", ChatCompletionRequest,
                 {"messages": [{"role": "u", "tool_calls": [[]] * 5000}]}, "128 items")
SPELLED, RENDERED, DROPPED = (each.name for each in requests.criteria[:3])


class Keeps(CompletionRequest):
    model_config = ConfigDict(extra="allow")


def of_prompts_alone(chars, context, longest, check=request_limits.check_text_length):
    """As if messages were not counted before they are rendered."""
    if chars == 5 * CONTEXT:
        check(chars, context, longest)


def anything(*given):
    """A check that lets everything pass."""


REQUESTS = {
    "a text is tokenized however long": ("server.request_limits:check_text_length", anything, SPELLED),
    "a message is rendered however long": ("server.request_limits:check_text_length", of_prompts_alone,
                                           RENDERED),
    "prompts are counted last": ("server.request_limits:MAX_PROMPTS_PER_REQUEST", 1 << 30, PROMPTS),
    "choices without end": ("server.request_limits:check_num_choices", anything, CHOICES),
    "prompts of any length together": ("server.request_limits:check_total_prompt_tokens", anything, TOTAL),
    "an answer of any length": ("server.request_limits:check_response_size", anything, SAID),
    "log-probabilities without end": ("server.request_limits:max_logprobs_per_response",
                                      lambda context: 1 << 30, PROBS),
    "stop strings without end": ("server.request_limits:check_stop_strings", anything, STOPS),
    "biases without end": ("server.request_limits:MAX_LOGIT_BIASES", 1 << 30, BIASES)}
MUTANTS = [
    *(Mutant(name, requests, patched(ask, f"nanoinfra.serve.{target}", instead), rejected_by)
      for name, (target, instead, rejected_by) in REQUESTS.items()),
    Mutant("unknown fields are kept", requests,
           lambda kind, **body: ask(Keeps if kind is CompletionRequest else kind, **body), DROPPED)]
