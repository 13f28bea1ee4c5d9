"""What clients of OpenAI's API get back: one object at the end, or a chunk for every piece of news.

A chunk with text is also a token's time stamp: the role comes with the first token, never before it, and the
usage in a last chunk whose list of choices is empty, if asked for. Load generators read both so.
"""
import json
import time
from collections.abc import Sequence
from io import StringIO
from math import isfinite

from nanoinfra.model.tokenizer import Text
from nanoinfra.serve.engine.requests import Event, Logprob, Request
from nanoinfra.serve.engine.token_text import Offsets, Spelling
from nanoinfra.serve.server import limits
from nanoinfra.serve.server.errors import Refused
from nanoinfra.serve.server.openai.choice import Choice
from nanoinfra.serve.server.openai.completion_requests import Question

DONE = b"data: [DONE]\n\n"
MOST_AT_ONCE = 2048                          # tokens and log-probabilities written without leave for others


def sent(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def written(data: dict) -> bytes:
    """`data` as JSON. Other threads may go on meanwhile, as json.dumps does not let them; it is slower."""
    out = StringIO()
    out.writelines(json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).iterencode(data))
    return out.getvalue().encode()


class Answer:
    """The answer to `question`, which the engine was asked as `requests`.

    Choice i x n + j is the j-th continuation of prompt i. Raises Refused where it would be too large.
    """
    whole, part = "", ""                     # what OpenAI calls the object at the end, and a chunk
    places_at_end = 0                        # tokens that `last` writes

    def __init__(self, question: Question, name: str, model: str, requests: Sequence[Request], text: Text):
        self.question, self.text, self.spelling = question, text, Spelling(text)
        self.head = {"id": name, "created": int(time.time()), "model": model}
        self.first = {request.id: i * question.n for i, request in enumerate(requests)}
        self.requests = {request.id: request for request in requests}
        self.given = sum(len(request.tokens) for request in requests)
        self.made, self.cached, self.begun, self.choices = 0, {}, set(), {}

    def chunk(self, event: Event) -> bytes:
        """What a stream says of an event; nothing where there is no news."""
        self._count(event)
        if not (event.text or event.logprobs or event.finish or self._echoes(event)):
            return b""
        chunk = self._chunk([self._piece(event)], self.question.stream_options.continuous_usage_stats)
        return b"data: " + written(chunk) + b"\n\n" if event.prompt else sent(chunk)

    def last(self) -> bytes:
        """The end of a stream."""
        return (sent(self._chunk([], True)) if self.question.stream_options.include_usage else b"") + DONE

    def failed(self, why: Refused) -> bytes:
        """The end of a stream that cannot go on."""
        return sent(why.body()) + DONE

    def add(self, event: Event) -> None:
        """News for the object."""
        self._count(event)
        place = event.request, event.index
        if place not in self.choices:
            self.choices[place] = Choice(event)
        self.choices[place].add(event)

    def object(self, events: Sequence[Event] = ()) -> dict:
        """All that was added, and `events`, at once."""
        for event in events:
            self.add(event)
        whole = [self._choice(choice.event()) for choice in self.choices.values()]
        return {**self.head, "object": self.whole, "choices": sorted(whole, key=lambda each: each["index"]),
                "usage": self._usage()}

    def body(self) -> bytes:
        """The same as JSON."""
        return written(self.object())

    @property
    def places(self) -> int:
        """Tokens in the object, those of prompts that were scored too, and its choices."""
        return self.made + sum(1 + len(choice.first.prompt) for choice in self.choices.values())

    def is_long(self, places: int) -> bool:
        """Would others wait too long while so many tokens are written, with their log-probabilities?"""
        logprobs = next(iter(self.requests.values())).logprobs
        return places * (1 if logprobs is None else 2 + logprobs) > MOST_AT_ONCE

    def _chunk(self, choices, usage):
        chunk = {**self.head, "object": self.part, "choices": choices}
        if self.question.stream_options.include_usage:
            chunk["usage"] = self._usage() if usage else None
        return chunk

    def _count(self, event):
        self.made += len(event.tokens)
        self.cached.setdefault(event.request, min(event.cached, len(self.requests[event.request].tokens)))

    def _usage(self):
        return {"prompt_tokens": self.given, "completion_tokens": self.made,
                "total_tokens": self.given + self.made,
                "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())}}

    def _begins(self, event):
        """Is it the first of its choice? True once."""
        new = self._place(event) not in self.begun
        self.begun.add(self._place(event))
        return new

    def _place(self, event):
        return self.first[event.request] + event.index


class CompletionAnswer(Answer):
    """Of /v1/completions."""
    whole = part = "text_completion"

    def __init__(self, *given):
        super().__init__(*given)
        self.offsets = {}                    # of the tokens that a choice has reported
        self.prompts = [each if isinstance(each, str) else self.text.decode(each)
                        for each in self.question.prompt] if self.question.echo else []
        limits.check_echo(sum(map(len, self.prompts)), self.question.n)

    def _echoes(self, event):
        return self.question.echo and self._place(event) not in self.begun

    def _piece(self, event):
        text = event.text
        if self._begins(event) and self.question.echo:
            text = self.prompts[self.first[event.request] // self.question.n] + text
        return {"index": self._place(event), "text": text, "logprobs": self._logprobs(event),
                "finish_reason": event.finish}

    _choice = _piece

    def _logprobs(self, event):
        if self.question.logprobs is None:
            return None
        every, place = [*event.prompt, *event.logprobs], self._place(event)
        if place not in self.offsets:
            echoed = self.prompts[place // self.question.n] if self.question.echo else ""
            self.offsets[place] = Offsets(self.spelling, len(echoed))
        offsets = self.offsets[place]
        return {"tokens": [self.spelling.token(each.token) for each in every],
                "token_logprobs": [_finite(each.logprob) for each in every],
                "top_logprobs": [self._top(each) for each in every],
                "text_offset": offsets.of_prompt([each.token for each in event.prompt])
                + [offsets.next(each.token) for each in event.logprobs]}

    def _top(self, each: Logprob):
        if each.logprob is None:
            return None
        likely = {}                          # two tokens may be spelled alike: the likelier stays
        for token, logprob in [*each.top, (each.token, each.logprob)]:
            likely.setdefault(self.spelling.token(token), _finite(logprob))
        return likely


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""
    whole, part = "chat.completion", "chat.completion.chunk"

    def _echoes(self, event):
        return False

    def _piece(self, event):
        role = {"role": "assistant"} if self._begins(event) else {}
        return {"index": event.index, "delta": {**role, "content": event.text},
                "logprobs": self._logprobs(event), "finish_reason": event.finish}

    def _choice(self, event):
        return {"index": event.index, "message": {"role": "assistant", "content": event.text},
                "logprobs": self._logprobs(event), "finish_reason": event.finish}

    def _logprobs(self, event):
        if not self.question.logprobs:
            return None
        return {"content": [{**self._say(each.token, each.logprob),
                             "top_logprobs": [self._say(*pair) for pair in each.top]}
                            for each in event.logprobs]}

    def _say(self, token, logprob):
        return {"token": self.spelling.token(token), "logprob": _finite(logprob),
                "bytes": list(self.spelling.bytes(token))}               # also of a part of a character


def _finite(logprob):
    """OpenAI's word for never: JSON has none for infinity."""
    return logprob if logprob is None or isfinite(logprob) else -9999.0
