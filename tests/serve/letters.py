"""Texts for tests that know every token: one that is a letter, or one that is a byte."""
from tokenizers import Tokenizer, decoders, models

from nanoinfra.model.tokenizer import Text

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]        # as GPT-2 spells bytes


def letters(ends=(), first=200, n=97) -> Text:
    """Token i is the character first + i."""
    backend = Tokenizer(models.WordLevel({chr(first + i): i for i in range(n)}, unk_token=chr(first)))
    backend.decoder = decoders.Fuse()
    return Text(backend, frozenset(ends))


def byte_text(special=(), several=()) -> Text:
    """Token i is the byte i; those of `several` bytes come behind, from 256, and then `special` ones."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    spelled = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}
    names = {byte: name for name, byte in spelled.items()}
    spelled |= {"".join(names[byte] for byte in each): 256 + i for i, each in enumerate(several)}
    backend = Tokenizer(models.BPE(spelled, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Text(backend)
