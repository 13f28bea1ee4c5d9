"""What clients of OpenAI's API get back: one object at the end, or a chunk for every piece of news.

A chunk with text is also a token's time stamp: the role comes with the first token, never before it, and the
usage in a last chunk whose list of choices is empty, if asked for. Load generators read both so.
"""
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from nanoinfra.model.text import Text
from nanoinfra.serve.errors import Refused
from nanoinfra.serve.protocol import Question
from nanoinfra.serve.requests import Event, Logprob, Request

DONE = b"data: [DONE]\n\n"


def sent(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def failed(why: Refused) -> bytes:
    """The end of a stream that cannot go on."""
    return sent(why.body()) + DONE


class Answer:
    """The answer to `question`, which the engine was asked as `requests`.

    Choice i x n + j is the j-th continuation of prompt i.
    """
    whole, part = "", ""                     # what OpenAI calls the object at the end, and a chunk

    def __init__(self, question: Question, name: str, model: str, requests: Sequence[Request], text: Text):
        self.question, self.text = question, text
        self.head = {"id": name, "created": int(time.time()), "model": model}
        self.first = {request.id: i * question.n for i, request in enumerate(requests)}
        self.requests = {request.id: request for request in requests}
        self.made, self.cached, self.begun = 0, {}, set()

    def chunk(self, event: Event) -> bytes:
        """What a stream says of an event; nothing where there is no news."""
        self._count(event)
        if not (event.text or event.logprobs or event.finish or self._echoes(event)):
            return b""
        return sent(self._chunk([self._piece(event)], self.question.stream_options.continuous_usage_stats))

    def last(self) -> bytes:
        """The end of a stream."""
        return (sent(self._chunk([], True)) if self.question.stream_options.include_usage else b"") + DONE

    def object(self, events: Sequence[Event]) -> dict:
        """All of it at once."""
        choices = {}
        for event in events:
            self._count(event)
            choices.setdefault((event.request, event.index), []).append(event)
        whole = [self._choice(_merged(news)) for news in choices.values()]
        return {**self.head, "object": self.whole, "choices": sorted(whole, key=lambda each: each["index"]),
                "usage": self._usage()}

    def _chunk(self, choices, usage):
        chunk = {**self.head, "object": self.part, "choices": choices}
        if self.question.stream_options.include_usage:
            chunk["usage"] = self._usage() if usage else None
        return chunk

    def _count(self, event):
        self.made += len(event.tokens)
        self.cached.setdefault(event.request, min(event.cached, len(self.requests[event.request].tokens)))

    def _usage(self):
        given = sum(len(request.tokens) for request in self.requests.values())
        return {"prompt_tokens": given, "completion_tokens": self.made, "total_tokens": given + self.made,
                "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())}}

    def _begins(self, event):
        """Is it the first of its choice? True once."""
        new = self._place(event) not in self.begun
        self.begun.add(self._place(event))
        return new

    def _place(self, event):
        return self.first[event.request] + event.index

    def _spell(self, token):
        return self.text.backend.decode([token], skip_special_tokens=False)


class CompletionAnswer(Answer):
    """Of /v1/completions."""
    whole = part = "text_completion"

    def __init__(self, *given):
        super().__init__(*given)
        self.shown = {}                      # characters of the tokens that a choice has reported

    def _echoes(self, event):
        return self.question.echo and self._place(event) not in self.begun

    def _piece(self, event):
        text = event.text
        if self._begins(event) and self.question.echo:
            text = self._prompt(event) + text
        return {"index": self._place(event), "text": text, "logprobs": self._logprobs(event),
                "finish_reason": event.finish}

    _choice = _piece

    def _prompt(self, event):
        given = self.question.prompt[self.first[event.request] // self.question.n]
        return given if isinstance(given, str) else self.text.decode(given)

    def _logprobs(self, event):
        if self.question.logprobs is None:
            return None
        every = [*event.prompt, *event.logprobs]
        spelled, at = [self._spell(each.token) for each in every], self.shown.get(self._place(event), 0)
        offsets = []
        for token in spelled:
            offsets.append(at)
            at += len(token)
        self.shown[self._place(event)] = at
        return {"tokens": spelled, "token_logprobs": [_finite(each.logprob) for each in every],
                "top_logprobs": [self._top(each) for each in every], "text_offset": offsets}

    def _top(self, each: Logprob):
        if each.logprob is None:
            return None
        likely = {}                          # two tokens may be spelled alike: the likelier stays
        for token, logprob in [*each.top, (each.token, each.logprob)]:
            likely.setdefault(self._spell(token), _finite(logprob))
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
        spelled = self._spell(token)
        return {"token": spelled, "logprob": _finite(logprob),
                "bytes": None if "\ufffd" in spelled else list(spelled.encode())}  # a part of a character


def _finite(logprob):
    """OpenAI's word for never: JSON has none for infinity."""
    return logprob if logprob is None or isfinite(logprob) else -9999.0


def _merged(news: Sequence[Event]) -> Event:
    """All events of a choice as one."""
    return replace(news[0], text="".join(each.text for each in news), finish=news[-1].finish,
                   tokens=[token for each in news for token in each.tokens],
                   logprobs=[logprob for each in news for logprob in each.logprobs])
