"""Build a SentencePiece BPE tokenizer from a GGUF file's tokens and scores, for the `tokenizers` library.

SentencePiece (Kudo & Richardson 2018) merges the two neighbours whose union has the highest score, of equal
ones the leftmost; `tokenizers` merges the pair that comes first in a list. So our list has every way to split
a token into two tokens, by descending score. A space is written as U+2581, one is put before every text, and
unknown characters become byte tokens (byte fallback), <0xE2> and so on.
"""
from collections.abc import Set

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers

from nanoinfra.model.weights.gguf.config import GGUFMetadata

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def build_sentencepiece_bpe(metadata: GGUFMetadata, tokens: list[str],
                            special_tokens: Set[str]) -> Tokenizer:
    """The tokenizer of these tokens and the metadata's scores; `special_tokens` are split off a text before.

    Raises ValueError for scores or tokens with which it would encode differently than SentencePiece.
    """
    scores = metadata.get_typed("scores", np.ndarray).tolist()
    if len(scores) < len(tokens) or not np.isfinite(scores).all():
        raise ValueError(f"its tokenizer has {len(tokens)} tokens, but {len(scores)} scores, or some that "
                         "are no numbers")
    ids = {token: i for i, token in enumerate(tokens)}
    if missing := [byte for byte in BYTE_TOKENS if byte not in ids]:
        raise ValueError(f"its tokenizer lacks the token {missing[0]} for a byte, without which not every "
                         "text can be written")
    whole = [token for token in tokens if token not in special_tokens or _SPACE in token]
    if out := [token for token in whole if _joins_no_token(token, ids)]:
        raise ValueError(f"its tokenizer has {out[0]!r}, but not every character of it as a token")
    merges = merges_by_score(whole, scores, ids)
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True))
    prefix = metadata.get_typed("add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def merges_by_score(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """The BPE merges: every pair of tokens whose union is one of `tokens`, the highest score first.

    Of equal scores, the longest left part comes first: so a run of spaces, whose lengths all have one score,
    is merged from its left. Raises ValueError where the order of other equal scores would matter.
    """
    found = []                               # (score, left, right)
    for token in tokens:
        found += [(scores[ids[token]], token[:i], token[i:]) for i in range(1, len(token))
                  if token[:i] in ids and token[i:] in ids]
    found.sort(key=lambda way: (-way[0], -len(way[1]), -len(way[2])))
    _check_ties(found)
    return [(left, right) for _, left, right in found]


def _joins_no_token(token, ids):
    """Whether SentencePiece can build this token from a character that is not a token itself.

    `tokenizers` cannot: it replaces such a character by its bytes first.
    """
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    return any({len(part) for part in cut if part not in ids} == {1} for cut in cuts)


def _check_ties(found):
    """Raise ValueError where two tokens of equal score compete for a part, as end and as beginning."""
    left_of = {}                             # (score, left part) -> a token of several different characters
    for score, left, right in found:
        if len(set(left + right)) > 1:
            left_of.setdefault((score, left), left + right)
    for score, left, right in found:
        other = left_of.get((score, right))
        if other and other != left + right:
            raise ValueError(f"its tokenizer gives {left + right!r} and {other!r} the same score {score}, so "
                             "that nothing says which one is joined first")
