"""Known-wrong translations between the Responses API and a chat: roles, calls, how an answer has ended.

`turns` makes the turns of an input, `ended` says of a stream's last event what became of the response; a
mutant of the library is patched in meanwhile.
"""
import json

from nanoinfra.lab.check import Check, CriterionNotMet
from nanoinfra.lab.mutants import Mutant, patched
from nanoinfra.serve.api_errors import APIError
from nanoinfra.serve.engine.request_and_output import RequestOutput
from nanoinfra.serve.processes.engine_loop import EngineReady
from nanoinfra.serve.server.openai import responses_api_requests
from nanoinfra.serve.server.openai.completion_requests import build_engine_requests, parse_request_body
from nanoinfra.serve.server.openai.responses_api_output import ResponsesResponse
from nanoinfra.serve.server.openai.responses_api_requests import ResponsesRequest, input_items_to_messages
from tests.serve.letters import byte_text

shape, ends = Check("turns of a response's input"), Check("the end of a response")
TEXT = byte_text(["<end>"])
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}


def turns(items):
    """The turns of a chat."""
    return input_items_to_messages(items)


def ended(*events, why=None):
    """The response in a stream's last event, after `events` and, perhaps, a failure."""
    question = parse_request_body(ResponsesRequest, b'{"input": "a", "stream": true}')
    ready = EngineReady({"context": 64, "vocab": 257}, TEXT, "template")
    asked = build_engine_requests(question, "r", ready, lambda *chat: "a")
    answer = ResponsesResponse(question, "r", "m", asked, TEXT)
    said = b"".join(map(answer.encode_stream_chunk,
                        events)) + (answer.encode_stream_error(why) if why else answer.encode_stream_end())
    return json.loads(said.strip().split(b"\ndata: ")[-1])["response"]


@shape.criterion("a developer speaks for the system", "property")
def _(subject):
    if (got := subject([{"role": "developer", "content": "be"}])[0]["role"]) != "system":
        raise CriterionNotMet(f"a developer's turn is one of {got!r}, a role that few templates know")


@shape.criterion("calls are one turn, each with its id", "property")
def _(subject):
    said = {"type": "function_call_output", "call_id": "1", "output": "a"}
    got = subject([CALL, CALL | {"call_id": "2"}, said])
    ids = [[call["id"] for call in turn.get("tool_calls", [])] or turn["tool_call_id"] for turn in got]
    if ids != [["1", "2"], "1"]:
        raise CriterionNotMet(f"two calls and the first one's output have the ids {ids}")


@ends.criterion("what is cut is incomplete", "property")
def _(subject):
    for finish, want in (("stop", "completed"), ("length", "incomplete")):
        if (got := subject(RequestOutput("r", text="a", token_ids=[1],
                                         finish_reason=finish))["status"]) != want:
            raise CriterionNotMet(f"a text that ended by {finish} is {got}")


@ends.criterion("a full queue is a rate limit", "property")
def _(subject):
    if (got := subject(why=APIError(429, "full"))["error"]["code"]) != "rate_limit_exceeded":
        raise CriterionNotMet(f"of a full queue a client reads {got}")


@ends.criterion("the text comes again", "property")
def _(subject):
    response = subject(RequestOutput("r", text="a"), RequestOutput("r", text="b", finish_reason="stop"))
    if (got := response["output"][0]["content"][0]["text"]) != "ab":
        raise CriterionNotMet(f"a and b end as {got!r}")


def _forgetful(item, i, _turn=responses_api_requests._item_to_message):
    turn = _turn(item, i)
    for call in turn.get("tool_calls", []):
        call["id"] = None
    return turn


MUTANTS = [
    Mutant("roles as they are", shape, patched(turns,
                                               "nanoinfra.serve.server.openai.responses_api_requests:_CHAT_ROLES",
                                               {"developer": "developer"}),
           "a developer speaks for the system"),
    Mutant("calls without ids", shape, patched(
        turns, "nanoinfra.serve.server.openai.responses_api_requests:_item_to_message", _forgetful),
           "calls are one turn, each with its id"),
    Mutant("all is completed", ends,
           patched(ended, "nanoinfra.serve.server.openai.responses_api_output:_STATUS_OF_FINISH_REASON",
                   dict.fromkeys(("stop", "length"), "completed")),
           "what is cut is incomplete"),
    Mutant("every failure is the server's", ends,
           patched(ended, "nanoinfra.serve.server.openai.responses_api_output:_ERROR_CODE_OF_STATUS", {}),
           "a full queue is a rate limit")]
