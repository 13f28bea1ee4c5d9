"""What clients of OpenAI's Responses API get back: one message of text, whole or as a stream of events.

The events are those of OpenAI's server, in its order. Each is numbered, and at the end the text comes again
with its part, its message and the response.
"""
import time
from collections.abc import Sequence

from nanoinfra.serve.engine.requests import Event
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.completion_responses import ChatAnswer, written
from nanoinfra.serve.server.openai.responses_requests import ResponsesRequest

STATUS = {"stop": "completed", "length": "incomplete"}       # of a response, by the engine's reason to end
CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}  # of a failure; all else is a server_error
MOST_ECHOED = 1 << 14                        # bytes of the request said again without leave for others


class ResponsesAnswer(ChatAnswer):
    """Of /v1/responses: one message, of one part."""

    def __init__(self, question: ResponsesRequest, name: str, model: str, *more):
        super().__init__(question, name, model, *more)
        self.head = {"id": name, "object": "response", "created_at": int(time.time()), "model": model}
        self.item, self.count = "msg_" + name.removeprefix("resp_"), 0   # events of the stream so far
        self.echoed = question.echoed_fields()
        self.echoes_much = len(written(self.echoed)) > MOST_ECHOED

    def object(self, events: Sequence[Event] = ()) -> dict:
        """All that was added, and `events`, at once."""
        for event in events:
            self.add(event)
        said = self._said()
        status = STATUS[said.finish]
        return self._response(status, [self._message(status, self._part(said))], self._usage())

    def chunk(self, event: Event) -> bytes:
        """What a stream says of an event."""
        self.add(event)
        opening = self._opening() if self.count == 0 else b""
        if not (event.text or event.logprobs):
            return opening
        return opening + self._in_part("response.output_text.delta", delta=event.text,
                                       logprobs=self._logprobs(event))

    def last(self) -> bytes:
        """The end of a stream: everything again."""
        whole, part = self.object(), self._part(self._said())
        message, = whole["output"]
        return b"".join((
            self._in_part("response.output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._in_part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{whole['status']}", response=whole)))

    def failed(self, why: Refused) -> bytes:
        """The end of a stream that cannot go on."""
        opening = self._opening() if self.count == 0 else b""
        error = {"code": CODES.get(why.status, "server_error"), "message": str(why)}
        return opening + self._event("response.failed", response=self._response("failed", error=error))

    @property
    def places_at_end(self) -> int:
        """Tokens that `last` writes."""
        return self.places

    def is_long(self, places: int) -> bool:
        """Would others wait too long while so many tokens are written, or what the request has brought?"""
        return self.echoes_much or super().is_long(places)

    def _opening(self):
        begun = self._response("in_progress")
        return b"".join((
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._in_part("response.content_part.added", part=self._part(Event("")))))

    def _in_part(self, kind, **fields):
        return self._event(kind, item_id=self.item, output_index=0, content_index=0, **fields)

    def _event(self, kind, **fields):
        data = written({"type": kind, "sequence_number": self.count, **fields})
        self.count += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _response(self, status, output=(), usage=None, error=None):
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        ended = int(time.time()) if status == "completed" else None
        return {**self.head, "status": status, "completed_at": ended, "error": error,
                "incomplete_details": why, "output": list(output), "usage": usage, **self.echoed}

    def _message(self, status, *parts):
        return {"id": self.item, "type": "message", "role": "assistant", "status": status,
                "content": [*parts]}

    def _part(self, event):
        return {"type": "output_text", "text": event.text, "annotations": [],
                "logprobs": self._logprobs(event)}

    def _said(self):
        choice, = self.choices.values()
        return choice.event()

    def _logprobs(self, event):
        return (super()._logprobs(event) or {"content": []})["content"]

    def _usage(self):
        """OpenAI is paid for what a cache keeps; here nothing is, so that nothing is counted as written."""
        chat = super()._usage()
        return {"input_tokens": chat["prompt_tokens"], "output_tokens": chat["completion_tokens"],
                "total_tokens": chat["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "input_tokens_details": {**chat["prompt_tokens_details"], "cache_write_tokens": 0}}
