"""What is kept of an answer that is not streamed, until its end.

A log-probability takes 12 bytes in flat arrays, where a Logprob's pairs of Python objects take 116 (vLLM's
FlatLogprobs); a token takes its characters, where an Event takes 600 bytes.
"""
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from io import StringIO

from nanoinfra.serve.engine.requests import Event, Logprob


class FlatLogprobs:
    """A sequence that grows, of Logprob whose own value is known: not a prompt's first."""

    def __init__(self):
        self.tokens, self.values = array("i"), array("d")    # a place's own, then its likeliest
        self.ends = array("q")                               # where each place ends in them

    def extend(self, logprobs: Iterable[Logprob]) -> None:
        """Add them at the end."""
        for each in logprobs:
            for token, value in ((each.token, each.logprob), *each.top):
                self.tokens.append(token)
                self.values.append(value)
            self.ends.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Logprob]:
        at = 0
        for end in self.ends:
            (token, value), *top = zip(self.tokens[at:end], self.values[at:end])
            yield Logprob(token, value, top)
            at = end


@dataclass
class Choice:
    """One continuation, as it grows."""
    first: Event
    finish: str | None = None
    text: StringIO = field(default_factory=StringIO)
    logprobs: FlatLogprobs = field(default_factory=FlatLogprobs)

    def add(self, event: Event) -> None:
        """The next of its events."""
        self.text.write(event.text)
        self.logprobs.extend(event.logprobs)
        self.finish = event.finish

    def event(self) -> Event:
        """All of them as one."""
        return replace(self.first, text=self.text.getvalue(), logprobs=self.logprobs, finish=self.finish)
