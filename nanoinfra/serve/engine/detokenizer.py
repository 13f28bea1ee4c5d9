"""What may be shown of a text that grows token by token: whole characters, and no part of a stop string.

What is shown, joined, is the text of all tokens decoded at once. `tokenizers`' DecodeStream shows a token
when the text no longer ends in U+FFFD, as it does within a character; what it cannot know is done around it
here. Held besides is the longest end of the text with which a stop string might begin. What a token costs
does not grow with the text.
"""
import re

from tokenizers.decoders import DecodeStream

from nanoinfra.model.tokenizer import CLEAN_UP, Text
from nanoinfra.model.weights.import_transformers import panics_as_errors

LONGEST = 4                                  # bytes of a character, and so its tokens at most
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")      # a token that stands for a byte, where the decoder says so


class Stream:
    """Turns token ids into text as they come, never showing a part of a character.

    A run of byte tokens waits for its end: one byte too many, and all of it decodes to U+FFFD, the characters
    before as well. A text that goes on and on ending in U+FFFD is cut, for DecodeStream would decode all of
    it again with every token. And ids that have no text never reach it. A decoder that may change what lies
    far back (text.py lists those that do not) gives all at the end.
    """

    def __init__(self, text: Text):
        self.text, self.stream = text, DecodeStream(skip_special_tokens=True)
        self.context, self.held = [], []     # ids that DecodeStream has shown last; that it has and holds
        self.run, self.skip = [], 0          # ids that it has not seen; characters shown of what it holds
        self.cleaners = [Replacer(*pair) for pair in CLEAN_UP.items()] if text.clean_up else []

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        spelled = self.text.backend.id_to_token(token)
        if spelled is None or token in self.text.special_ids:
            return ""
        self.run.append(token)
        if not self.text.is_local or self.text.has_bytes and BYTE.fullmatch(spelled):
            return ""
        ids, self.run = self.run, []
        self.held += ids
        if new := self._step(ids):
            new, self.skip = new[self.skip:], 0
            self.context, self.held = self.held, []
        elif len(self.held) >= 4 * LONGEST:
            new = self._cut()
        return self._clean(new)

    def finish(self) -> str:
        """What is left: U+FFFD where the text ends within a character."""
        new = self._behind(self.context, self.held + self.run)[self.skip:]
        self.context, self.held, self.run, self.skip = [], [], [], 0
        return self._clean(new, last=True)

    def _cut(self):
        """Let DecodeStream begin anew with the last tokens: what comes before them is certain.

        A character may lie across the cut. Its bytes behind it are no character by themselves, a U+FFFD each
        at the most: so many are skipped as make both parts the whole.
        """
        whole, last, anchor = self._behind(self.context, self.held), self.held[-LONGEST:], self.text.anchor
        rest = self._behind(anchor, last)
        for skip in range(LONGEST):
            if whole.endswith(rest[skip:]):
                shown = whole[self.skip:len(whole) - len(rest) + skip]
                self.stream = DecodeStream(ids=anchor, skip_special_tokens=True)
                if new := self._step(last):                              # by itself it ends otherwise
                    anchor, last, shown, skip = last, [], shown + new[skip:], 0
                self.context, self.held, self.skip = anchor, last, skip
                return shown
        return ""

    def _behind(self, context, ids):
        """The text of `ids` behind `context`."""
        decode = self.text.backend.decode
        with panics_as_errors():
            return decode(context + ids)[len(decode(context)) if context else 0:]

    def _step(self, ids):
        """What DecodeStream shows for `ids`."""
        with panics_as_errors():
            return self.stream.step(self.text.backend, ids) or ""

    def _clean(self, new, last=False):
        for cleaner in self.cleaners:
            new = cleaner.push(new) + (cleaner.finish() if last else "")
        return new


class Replacer:
    """`str.replace(old, new)` of a text that comes in pieces."""

    def __init__(self, old: str, new: str):
        self.old, self.new, self.held = old, new, ""

    def push(self, piece: str) -> str:
        """What is certain now and was not before."""
        *before, rest = (self.held + piece).split(self.old)
        shown = len(rest) - _overlap(rest, self.old)
        self.held = rest[shown:]
        return self.new.join([*before, rest[:shown]])

    def finish(self) -> str:
        """What is left."""
        rest, self.held = self.held, ""
        return rest


class Writer:
    """A Stream that ends before the first of the texts `stop`; `stopped` says that one has come.

    While `passes` is set, one that comes ends nothing.
    """

    def __init__(self, text: Text, stop: tuple[str, ...] = ()):
        self.stream, self.stop, self.held, self.stopped = Stream(text), stop, "", False
        self.passes = False

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        return self._show(self.stream.push(token), last=False)

    def finish(self) -> str:
        """What is left, where no stop string has come."""
        return self._show(self.stream.finish(), last=True)

    def _show(self, new, last):
        text = "" if self.stopped else self.held + new
        if found := [at for stop in self.stop if not self.passes and (at := text.find(stop)) >= 0]:
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
