"""Known-wrong answers to clients: tools that are dropped, bytes and places of tokens that are their names'.

`chat` makes a prompt of a body, or says why not; `placed` says a text's tokens by their bytes and places; a
mutant of the library is patched in meanwhile.
"""
import json

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine import token_text_and_offsets
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai.completion_requests import (
    ChatCompletionRequest,
    build_engine_requests,
    parse_request_body,
)
from tests.serve.letters import byte_text

tools, places = Check("tools of a chat"), Check("places of tokens")
TEXT = byte_text(["<end>"])
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"function": {"name": "weather", "arguments": '{"city": "x"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOKEN_TEXT = "nanoinfra.serve.engine.token_text_and_offsets"


def chat(template, **body):
    """The prompt, as JSON of what `template` shows, or the reason why there is none."""
    def render(template, messages, text, tools):
        shown = messages if "calls" in template else [message["role"] for message in messages]
        return json.dumps([shown, tools if "tools" in template else None], separators=(",", ":"))
    try:
        body = json.dumps({"messages": [{"role": "user", "content": "a"}], **body}).encode()
        ready = EngineReady({"context": 512, "vocab": 257}, TEXT, template)
        request, = build_engine_requests(parse_request_body(ChatCompletionRequest, body), "r", ready, render)
        return TEXT.decode(request.prompt_token_ids)
    except APIError as why:
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
    offsets = token_text_and_offsets.TextOffsets(token_text_and_offsets.SingleTokenDecoder(TEXT))
    return ([offsets.token_decoder.token_bytes(token) for token in ids],
            [offsets.next_offset(token) for token in ids])


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


class OfItsText(token_text_and_offsets.SingleTokenDecoder):
    def token_bytes(self, token):
        return self.token_text(token).encode()


class CountsNames(token_text_and_offsets.TextOffsets):
    def next_offset(self, token):
        self.at += len(self.token_decoder.token_text(token))
        return self.at - len(self.token_decoder.token_text(token))


SEEN, OBJECT, NONE = (c.name for c in tools.criteria)
BYTES, COUNTED = (c.name for c in places.criteria)
MUTANTS = [
    Mutant("nobody looks whether tools are shown", tools,
           patched(chat, "nanoinfra.serve.server.openai.chat_messages:_renders_the_same", lambda *_: False),
           SEEN),
    Mutant("arguments stay text", tools,
           patched(chat, "nanoinfra.serve.server.openai.chat_messages:_with_parsed_arguments",
                   lambda call: call), OBJECT),
    Mutant("a token's bytes are its text's", places,
           patched(placed, f"{TOKEN_TEXT}:SingleTokenDecoder", OfItsText), BYTES),
    Mutant("names of tokens are counted", places,
           patched(placed, f"{TOKEN_TEXT}:TextOffsets", CountsNames), COUNTED),
]
