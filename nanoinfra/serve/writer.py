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


class Writer:
    """A Stream that ends before the first of the texts `stop`; `stopped` says that one has come."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()):
        self.stream, self.stop, self.held, self.stopped = Stream(decode), stop, "", False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        return self._show(self.stream.push(token), last=False)

    def finish(self) -> str:
        """What is left, where no stop string has come."""
        return self._show(self.stream.finish(), last=True)

    def _show(self, new, last):
        text = "" if self.stopped else self.held + new
        if (found := [at for stop in self.stop if (at := text.find(stop)) >= 0]):
            text, self.held, self.stopped = text[:min(found)], "", True
            return text
        hold = 0 if last else max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold]


def _overlap(text, stop):
    """Characters of the longest end of `text` that `stop` begins with, all of it apart.

    `text` is what was held and little more, so what is not held costs nothing.
    """
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[len(text) - n:])), 0)
