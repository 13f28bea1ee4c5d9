"""Known-wrong limits of a request: texts tokenized that cannot fit, stop strings and answers without end.

`ask` reads one body as the server does, up to what the engine would be asked; a mutant of the library is
patched in meanwhile.
"""
import json

from pydantic import ConfigDict

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.server import limits
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.completion_requests import Chat, Completion, read, requests_of
from nanoinfra.serve.server.openai.completion_responses import ChatAnswer, CompletionAnswer

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


def ask(kind, **body):
    """(why it was refused, or None; characters that were tokenized; chats rendered; fields kept)."""
    letters, rendered, kept = Letters(), [], ()
    ready = Ready({"context": CONTEXT, "vocab": 97}, Text(letters), "template")
    try:
        question = read(kind, json.dumps(body).encode())
        kept = question.model_extra or ()
        asked = requests_of(question, "r", ready, lambda *chat: rendered.append(chat) or "abc")
        form = ChatAnswer if kind is Chat else CompletionAnswer
        form(question, "r", "m", asked, ready.text)
    except Refused as refused:
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
    why, seen, _, _ = subject(Completion, prompt="a" * 5 * CONTEXT)
    if seen or not why:
        raise CriterionNotMet(f"a prompt of {5 * CONTEXT} characters, at most {4 * CONTEXT} fit: {seen} were "
                              "tokenized")


@requests.criterion("a chat that no context spells is not rendered", "property")
def _(subject):
    why, _, rendered, _ = subject(Chat, messages=[{"role": "user", "content": "a" * 5 * CONTEXT}])
    if rendered or not why:
        raise CriterionNotMet(f"a message of {5 * CONTEXT} characters was rendered; "
                              f"at most {4 * CONTEXT} fit")


@requests.criterion("what nobody knows is dropped", "property")
def _(subject):
    *_, kept = subject(Completion, prompt="a", max_tokens=1, unheard_of=[1])
    if kept:
        raise CriterionNotMet(f"a field that nobody knows is kept: {kept}")


PROMPTS = _refuses("prompts are few", Completion, {"prompt": ["a"] * 2000, "max_tokens": 1}, "2000 prompts")
CHOICES = _refuses("choices are few", Completion, {"prompt": ["a"] * 99, "n": 64, "max_tokens": 1}, "choices")
TOTAL = _refuses("prompts are short together", Completion, {"prompt": [[1] * 60] * 100, "max_tokens": 1},
                 "tokens in one request")
SAID = _refuses("an answer has few tokens", Completion, {"prompt": ["a"] * 99, "max_tokens": 60}, "come to")
PROBS = _refuses("an answer has few log-probabilities", Completion,
                 {"prompt": [1] * 30, "n": 64, "echo": True, "logprobs": 90, "max_tokens": 1}, "log-probabil")
STOPS = _refuses("stop strings are short", Completion, {"prompt": "a", "stop": "a" * 5000}, "stop strings")
BIASES = _refuses("biases are few", Completion,
                  {"prompt": "a", "logit_bias": {f"w{i}": 1 for i in range(2000)}}, "2000 tokens; give")
DIGITS = _refuses("numbers have few digits", Completion, {"prompt": "a", "n": int("7" * 400)}, "less than")
CALLS = _refuses("a message has few calls", Chat,
                 {"messages": [{"role": "u", "tool_calls": [[]] * 5000}]}, "128 items")
SPELLED, RENDERED, DROPPED = (each.name for each in requests.criteria[:3])


class Keeps(Completion):
    model_config = ConfigDict(extra="allow")


def of_prompts_alone(chars, context, longest, check=limits.check_chars):
    """As if messages were not counted before they are rendered."""
    if chars == 5 * CONTEXT:
        check(chars, context, longest)


def anything(*given):
    """A check that lets everything pass."""


REQUESTS = {
    "a text is tokenized however long": ("limits:check_chars", anything, SPELLED),
    "a message is rendered however long": ("limits:check_chars", of_prompts_alone, RENDERED),
    "prompts are counted last": ("limits:MOST_PROMPTS", 1 << 30, PROMPTS),
    "choices without end": ("limits:check_choices", anything, CHOICES),
    "prompts of any length together": ("limits:check_prompt_tokens", anything, TOTAL),
    "an answer of any length": ("limits:check_answer", anything, SAID),
    "log-probabilities without end": ("limits:most_logprobs", lambda context: 1 << 30, PROBS),
    "stop strings without end": ("limits:check_stops", anything, STOPS),
    "biases without end": ("limits:MOST_BIASES", 1 << 30, BIASES)}
MUTANTS = [
    *(Mutant(name, requests, patched(ask, f"nanoinfra.serve.{target}", instead), rejected_by)
      for name, (target, instead, rejected_by) in REQUESTS.items()),
    Mutant("unknown fields are kept", requests,
           lambda kind, **body: ask(Keeps if kind is Completion else kind, **body), DROPPED)]
