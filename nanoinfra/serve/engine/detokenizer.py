"""The incremental detokenizer: text of tokens as they come, in whole characters, without stop strings.

What is shown, joined, is the text of all tokens decoded at once. `tokenizers`' DecodeStream shows a token
once the text no longer ends in U+FFFD, which it does within a character; this module adds what DecodeStream
cannot know. Text that may be the beginning of a stop string is held back. The cost of a token does not grow
with the text.
"""
import re

from tokenizers.decoders import DecodeStream

from nanoinfra.model.tokenizer import CLEAN_UP_REPLACEMENTS, Tokenizer
from nanoinfra.model.weights.call_transformers import rust_panics_as_errors

MAX_TOKENS_PER_CHARACTER = 4                 # a character has at most 4 bytes in UTF-8, a token at least one
BYTE_TOKEN_PATTERN = re.compile("<0x[0-9A-Fa-f]{2}>")        # a token of a single byte (sentencepiece)


class IncrementalDetokenizer:
    """Turns token ids into text as they come, and never shows a part of a character.

    A run of byte tokens waits for its end: with one byte too many all of it decodes to U+FFFD, the characters
    before as well. A text that goes on and on ending in U+FFFD is cut, because DecodeStream would decode all
    of it again with every token. Ids that have no text never reach it. With a decoder that may change text
    far back (model/tokenizer.py lists those that do not), all text comes at the end.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self.context, self.held = [], []     # ids that DecodeStream has shown last; ids that it has and holds
        self.run, self.skip = [], 0          # ids that it has not seen; characters shown of what it holds
        replacements = CLEAN_UP_REPLACEMENTS.items() if tokenizer.clean_up_tokenization_spaces else ()
        self.cleaners = [StreamingReplacer(*pair) for pair in replacements]

    def push_token(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        spelled = self.tokenizer.backend_tokenizer.id_to_token(token)
        if spelled is None or token in self.tokenizer.special_token_ids:
            return ""
        self.run.append(token)
        is_byte = self.tokenizer.has_byte_fallback and BYTE_TOKEN_PATTERN.fullmatch(spelled)
        if not self.tokenizer.is_incrementally_decodable or is_byte:
            return ""
        ids, self.run = self.run, []
        self.held += ids
        if new := self._step(ids):
            new, self.skip = new[self.skip:], 0
            self.context, self.held = self.held, []
        elif len(self.held) >= 4 * MAX_TOKENS_PER_CHARACTER:
            new = self._cut()
        return self._clean(new)

    def flush(self) -> str:
        """The rest of the text, with U+FFFD where it ends within a character."""
        new = self._decode_after(self.context, self.held + self.run)[self.skip:]
        self.context, self.held = [], []
        self.run, self.skip = [], 0
        return self._clean(new, last=True)

    def _cut(self):
        """Let DecodeStream begin anew with the last tokens: the text before them is certain.

        A character may lie across the cut. Its bytes after the cut are no character by themselves, at most a
        U+FFFD each; as many of these are skipped as make both parts together the whole text.
        """
        whole, last = self._decode_after(self.context, self.held), self.held[-MAX_TOKENS_PER_CHARACTER:]
        anchor = self.tokenizer.decoding_prefix_ids
        rest = self._decode_after(anchor, last)
        for skip in range(MAX_TOKENS_PER_CHARACTER):
            if whole.endswith(rest[skip:]):
                shown = whole[self.skip:len(whole) - len(rest) + skip]
                self.stream = DecodeStream(ids=anchor, skip_special_tokens=True)
                if new := self._step(last):                              # by itself it ends otherwise
                    anchor, last = last, []
                    shown, skip = shown + new[skip:], 0
                self.context, self.held = anchor, last
                self.skip = skip
                return shown
        return ""

    def _decode_after(self, context, ids):
        """The text of `ids` after `context`."""
        decode = self.tokenizer.backend_tokenizer.decode
        with rust_panics_as_errors():
            return decode(context + ids)[len(decode(context)) if context else 0:]

    def _step(self, ids):
        """What DecodeStream shows for `ids`."""
        with rust_panics_as_errors():
            return self.stream.step(self.tokenizer.backend_tokenizer, ids) or ""

    def _clean(self, new, last=False):
        for cleaner in self.cleaners:
            new = cleaner.push_text(new) + (cleaner.flush() if last else "")
        return new


class StreamingReplacer:
    """`str.replace(old, new)` of a text that comes in pieces."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new
        self.held = ""

    def push_text(self, piece: str) -> str:
        """Add a piece; returns the replaced text that is certain now and was not before."""
        *before, rest = (self.held + piece).split(self.old)
        shown = len(rest) - _overlap(rest, self.old)
        self.held = rest[shown:]
        return self.new.join([*before, rest[:shown]])

    def flush(self) -> str:
        """The rest of the text."""
        rest, self.held = self.held, ""
        return rest


class StopStringDetokenizer:
    """An IncrementalDetokenizer whose text ends before the first stop string; `stopped` says that one came.

    While `ignore_stop_strings` is set (min_tokens), a stop string that comes ends nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: tuple[str, ...] = ()):
        self.detokenizer, self.stop_strings = IncrementalDetokenizer(tokenizer), stop_strings
        self.held, self.stopped = "", False
        self.ignore_stop_strings = False

    def push_token(self, token: int) -> str:
        """Add a token; returns the text that is certain now and was not before."""
        return self._show(self.detokenizer.push_token(token), last=False)

    def flush(self) -> str:
        """The rest of the text; nothing where a stop string has come."""
        return self._show(self.detokenizer.flush(), last=True)

    def _show(self, new, last):
        text = "" if self.stopped else self.held + new
        stops = () if self.ignore_stop_strings else self.stop_strings
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            self.held, self.stopped = "", True
            return text[:min(found)]
        hold = 0 if last else max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        self.held = text[len(text) - hold:]
        return text[:len(text) - hold]


def _overlap(text, stop):
    """The length of the longest end of `text` with which `stop` begins, if it is not all of `stop`.

    `text` is the held text and little more, so text that is not held costs nothing.
    """
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[len(text) - n:])), 0)
