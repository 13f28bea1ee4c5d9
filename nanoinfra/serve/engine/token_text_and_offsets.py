"""The text and the bytes of a token by itself,
and the offsets of tokens in their text (OpenAI's text_offset).

A token may be a part of a character, as bytes of UTF-8: GPT-2 spells each byte as a letter of its own
(ByteLevel), sentencepiece as <0xE2> (ByteFallback). Clients that join these bytes get the text exactly.
"""
import codecs
from collections.abc import Sequence

from nanoinfra.model.tokenizer import Tokenizer
from nanoinfra.model.weights.call_transformers import rust_panics_as_errors
from nanoinfra.serve.engine.detokenizer import BYTE_TOKEN_PATTERN

_PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]     # GPT-2 spells them as Latin-1
_OTHER_BYTES = [byte for byte in range(256) if byte not in _PRINTABLE_BYTES]
_BYTE_DECODER = ({chr(byte): byte for byte in _PRINTABLE_BYTES}
                 | {chr(256 + i): byte for i, byte in enumerate(_OTHER_BYTES)})


class SingleTokenDecoder:
    """Decodes single tokens of one tokenizer, each at most once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.texts = tokenizer, {}

    def token_text(self, token: int) -> str:
        """Its text within a text: with a space where it begins a word; U+FFFD for a part of a character."""
        if token not in self.texts:
            self.texts[token] = self._decode([token])
        return self.texts[token]

    def token_bytes(self, token: int) -> bytes:
        """Its own bytes, which may be a part of a character."""
        name = self.tokenizer.backend_tokenizer.id_to_token(token) or ""
        if token in self.tokenizer.added_token_ids:
            return name.encode()
        if self.tokenizer.has_byte_fallback and BYTE_TOKEN_PATTERN.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if self.tokenizer.is_byte_level and all(letter in _BYTE_DECODER for letter in name):
            return bytes(_BYTE_DECODER[letter] for letter in name)
        return self.token_text(token).encode()

    def first_token_bytes(self, token: int) -> bytes:
        """Its bytes where it begins a text: some decoders take a space off there."""
        whole, alone = self.token_bytes(token), self._decode([token], context=()).encode()
        return alone if whole.endswith(alone) else whole

    def _decode(self, ids, context=None):
        """The text of `ids` after `context`, by default after a plain token."""
        decode = self.tokenizer.backend_tokenizer.decode
        context = self.tokenizer.decoding_prefix_ids if context is None else list(context)
        with rust_panics_as_errors():
            whole = decode(context + ids, skip_special_tokens=False)
            return whole[len(decode(context)):] if context else whole


class TextOffsets:
    """Says where the tokens of one choice begin in its text, in characters, as they come.

    A token that goes on with a character begins where the character does, and a token that is not shown
    begins where the next one does. The prompt has `echoed_chars` characters, where it is shown.
    """

    def __init__(self, token_decoder: SingleTokenDecoder, echoed_chars: int = 0):
        self.token_decoder, self.at = token_decoder, echoed_chars
        self._begin()

    def prompt_offsets(self, tokens: Sequence[int]) -> list[int]:
        """The offsets of all tokens of the prompt, which come first."""
        if not tokens:
            return []
        echoed, self.at = self.at, 0
        offsets = [min(self.next_offset(token), echoed) for token in tokens]
        self.at = echoed
        self._begin()                        # the answer is decoded by itself
        return offsets

    def next_offset(self, token: int) -> int:
        """The offset of the next token."""
        at, decoder = self.at, self.token_decoder
        if token not in decoder.tokenizer.special_token_ids:
            new = decoder.token_bytes(token) if self.begun else decoder.first_token_bytes(token)
            self.at, self.begun = at + len(self.utf8.decode(new)), True
        return at

    def _begin(self):
        self.utf8, self.begun = codecs.getincrementaldecoder("utf-8")("replace"), False
