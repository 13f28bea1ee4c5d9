"""What may be shown of a text that grows token by token: whole characters, and no part of a stop string.

One character may be spread over up to four tokens; until it is whole, `decode` ends in U+FFFD and that is
held. So is the longest end of the text with which a stop string might begin. What a token costs does not grow
with the text.
"""
from collections.abc import Callable

LONGEST = 4                                  # bytes of a character, and so its tokens at most


class Stream:
    """Turns token ids into text as they come, never showing a part of a character."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self.decode, self.context, self.window, self.shown = decode, [], [], 0

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.window.append(token)
        text = self._text()
        new = text.removesuffix("\ufffd")[self.shown:]
        self.shown += len(new)
        if self.shown == len(text):  # whole: it need not be decoded again
            self.context, self.window, self.shown = self.window, [], 0
        elif len(self.window) >= 4 * LONGEST:  # bytes that are no character, one after another
            new += self._shorten(text)
        return new

    def finish(self) -> str:
        """What is left: U+FFFD where the text ends within a character."""
        new = self._text()[self.shown:]
        self.context, self.window, self.shown = [], [], 0
        return new

    def _shorten(self, text):
        """Take all but the last tokens, with which a character may begin, for context. What that shows."""
        before, last = self.window[:-LONGEST], self.window[-LONGEST:]
        passed = len(self.decode(self.context + before)) - len(self.decode(self.context))
        if passed <= self.shown:
            self.context, self.window, self.shown = before, last, self.shown - passed
            return ""
        rest = text[self.shown:]             # the last have no text: what is held was begun long before
        self.context, self.window, self.shown = self.window, [], 0
        return rest

    def _text(self):
        return self.decode(self.context + self.window)[len(self.decode(self.context)):]


class Match:
    """With how much of `stop` a text ends: `length` characters. Knuth, Morris and Pratt 1977.

    What a mismatch falls back to is computed as far as the text has come.
    """

    def __init__(self, stop: str):
        self.stop, self.length, self.falls = stop, 0, [0]

    def push(self, text: str) -> int:
        """Add `text`: after how many of its characters `stop` is whole for the first time; 0, it is not."""
        for at, letter in enumerate(text, 1):
            self.length = self._next(self.length, letter)
            if self.length == len(self.stop):
                return at
        return 0

    def _next(self, length, letter):
        while length and self.stop[length] != letter:
            length = self._fall(length)
        return length + (self.stop[length] == letter)

    def _fall(self, length):
        """The longest end of stop[:length], less than all of it, that `stop` begins with."""
        while len(self.falls) < length:
            self.falls.append(self._next(self.falls[-1], self.stop[len(self.falls)]))
        return self.falls[length - 1]


class Writer:
    """A Stream that ends before the first of the texts `stop`; `stopped` says that one has come."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        self.stream, self.stop, self.held, self.stopped = Stream(decode), stop, "", False
        self.matches = [Match(each) for each in stop]

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        return self._show(self.stream.push(token), last=False)

    def finish(self) -> str:
        """What is left, where no stop string has come."""
        return self._show(self.stream.finish(), last=True)

    def _show(self, new, last):
        if self.stopped:
            return ""
        text, before = self.held + new, len(self.held)
        begins = [before + at - len(match.stop) for match in self.matches if (at := match.push(new))]
        if begins:
            self.held, self.stopped = "", True
            return text[:min(begins)]
        hold = 0 if last else max((match.length for match in self.matches), default=0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold]
