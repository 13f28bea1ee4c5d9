"""What a token is by itself, in characters and in bytes, and where in the text it stands.

A token may be a part of a character, as bytes of UTF-8: GPT-2 spells each byte as a letter of its own
(ByteLevel), sentencepiece as <0xE2> (ByteFallback). Clients that put bytes together get the text exactly.
"""
import codecs
from collections.abc import Sequence

from nanoinfra.model.tokenizer import Text
from nanoinfra.model.weights.import_transformers import panics_as_errors
from nanoinfra.serve.engine.detokenizer import BYTE

PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]            # bytes that GPT-2 spells as Latin-1
OTHERS = [byte for byte in range(256) if byte not in PLAIN]
BYTES = {chr(byte): byte for byte in PLAIN} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


class Spelling:
    """The tokens of one tokenizer; each is decoded once."""

    def __init__(self, text: Text):
        self.text, self.tokens = text, {}

    def token(self, token: int) -> str:
        """Its text within a text: with a space, where it begins a word; U+FFFD for a part of a character."""
        if token not in self.tokens:
            self.tokens[token] = self._decode([token])
        return self.tokens[token]

    def bytes(self, token: int) -> bytes:
        """Its own bytes."""
        name = self.text.backend.id_to_token(token) or ""
        if token in self.text.added_ids:
            return name.encode()
        if self.text.has_bytes and BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if self.text.is_byte_level and all(letter in BYTES for letter in name):
            return bytes(BYTES[letter] for letter in name)
        return self.token(token).encode()

    def first(self, token: int) -> bytes:
        """Its bytes where it begins a text: some decoders take a space off there."""
        whole, alone = self.bytes(token), self._decode([token], behind=()).encode()
        return alone if whole.endswith(alone) else whole

    def _decode(self, ids, behind=None):
        decode, behind = self.text.backend.decode, self.text.anchor if behind is None else list(behind)
        with panics_as_errors():
            whole = decode(behind + ids, skip_special_tokens=False)
            return whole[len(decode(behind)):] if behind else whole


class Offsets:
    """Where the tokens of one choice begin in its text, in characters, as they come.

    A token that goes on with a character begins where the character does, and one that is not shown where the
    next does. The prompt is `echoed` characters long, where it is shown.
    """

    def __init__(self, spelling: Spelling, echoed: int = 0):
        self.spelling, self.at = spelling, echoed
        self._begin()

    def of_prompt(self, tokens: Sequence[int]) -> list[int]:
        """Of all tokens of the prompt, which come first."""
        if not tokens:
            return []
        echoed, self.at = self.at, 0
        offsets = [min(self.next(token), echoed) for token in tokens]
        self.at = echoed
        self._begin()                        # the answer is decoded by itself
        return offsets

    def next(self, token: int) -> int:
        """Where the next token begins."""
        at = self.at
        if token not in self.spelling.text.special_ids:
            new = self.spelling.bytes(token) if self.begun else self.spelling.first(token)
            self.at, self.begun = at + len(self.decoder.decode(new)), True
        return at

    def _begin(self):
        self.decoder, self.begun = codecs.getincrementaldecoder("utf-8")("replace"), False
