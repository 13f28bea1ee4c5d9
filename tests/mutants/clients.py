"""Known-wrong answers to clients: tools that are dropped, bytes and places of tokens that are their names'.

`chat` makes a prompt of a body, or says why not; `placed` says a text's tokens by their bytes and places; a
mutant of the library is patched in meanwhile.
"""
import json

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.engine import token_text
from nanoinfra.serve.processes.engine_loop import Ready
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.completion_requests import Chat, read, requests_of
from tests.serve.letters import byte_text

tools, places = Check("tools of a chat"), Check("places of tokens")
TEXT = byte_text(["<end>"])
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"function": {"name": "weather", "arguments": '{"city": "x"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def chat(template, **body):
    """The prompt, as JSON of what `template` shows, or the reason why there is none."""
    def render(template, messages, text, tools):
        shown = messages if "calls" in template else [message["role"] for message in messages]
        return json.dumps([shown, tools if "tools" in template else None], separators=(",", ":"))
    try:
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], **body}).encode()
        ready = Ready({"context": 512, "vocab": 257}, TEXT, template)
        request, = requests_of(read(Chat, body), "r", ready, render)
        return TEXT.decode(request.tokens)
    except Refused as why:
        return str(why)


@tools.criterion("what no template shows is refused", "property")
def _(subject):
    for body in ({"tools": [TOOL]}, {"messages": [CALLS]}):
        if "would never see them" not in (got := subject("nothing", **body)):
            raise CriterionNotMet(f"{body} with a template that shows neither becomes {got}")


@tools.criterion("arguments are an object", "property")
def _(subject):
    if '"arguments":{"city":"x"}' not in (got := subject("calls", messages=[CALLS])):
        raise CriterionNotMet(f"a template that writes arguments as JSON makes {got} of them")


@tools.criterion("who may call none is shown none", "property")
def _(subject):
    if "weather" in (got := subject("tools", tools=[TOOL], tool_choice="none")):
        raise CriterionNotMet(f"with tool_choice none the model reads {got}")


def placed(ids):
    """(bytes of each token, its place in the text)."""
    offsets = token_text.Offsets(token_text.Spelling(TEXT))
    return [offsets.spelling.bytes(token) for token in ids], [offsets.next(token) for token in ids]


@places.criterion("a part of a character has its bytes", "property")
def _(subject):
    ids = list("a\u00e9".encode())
    if b"".join(got := subject(ids)[0]) != bytes(ids):
        raise CriterionNotMet(f"the bytes of {ids} are {got}")


@places.criterion("characters of the text are counted", "property")
def _(subject):
    for ids, want in (([256, 97, 98], [0, 0, 1]), ([*"\u00e9b".encode(), 97], [0, 0, 1, 2])):
        if (got := subject(ids)[1]) != want:
            raise CriterionNotMet(f"{ids} stand at {got} of {TEXT.decode(ids)!r}, want {want}")


class OfItsText(token_text.Spelling):
    def bytes(self, token):
        return self.token(token).encode()


class CountsNames(token_text.Offsets):
    def next(self, token):
        self.at += len(self.spelling.token(token))
        return self.at - len(self.spelling.token(token))


SEEN, OBJECT, NONE = (c.name for c in tools.criteria)
BYTES, COUNTED = (c.name for c in places.criteria)
MUTANTS = [
    Mutant("nobody looks whether tools are shown", tools,
           patched(chat, "nanoinfra.serve.server.openai.chat_messages:_is_same", lambda *_: False), SEEN),
    Mutant("arguments stay text", tools,
           patched(chat, "nanoinfra.serve.server.openai.chat_messages:_with_arguments_read",
                   lambda call: call), OBJECT),
    Mutant("a token's bytes are its text's", places,
           patched(placed, "nanoinfra.serve.engine.token_text:Spelling", OfItsText), BYTES),
    Mutant("names of tokens are counted", places,
           patched(placed, "nanoinfra.serve.engine.token_text:Offsets", CountsNames), COUNTED),
]
