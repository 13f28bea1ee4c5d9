"""Sentencepiece's BPE from a GGUF file's tokens and scores, for the `tokenizers` library.

sentencepiece (Kudo & Richardson 2018) joins the two neighbours whose union has the highest score, of equal
ones the leftmost; `tokenizers` joins the pair that comes first in a list. So the list holds every way to cut
a token in two tokens, by descending score. A space is written as U+2581, one is put before every text, and
what is no token becomes its bytes, <0xE2> and so on.
"""
from collections.abc import Set

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spm(keys, tokens: list[str], special: Set[str]) -> Tokenizer:
    """The tokenizer of these tokens; `special` are found in text before. ValueError for broken ones."""
    scores = keys.get("scores", np.ndarray).tolist()
    if len(scores) < len(tokens) or not np.isfinite(scores).all():
        raise ValueError(f"its tokenizer has {len(tokens)} tokens, but {len(scores)} scores, or some that "
                         "are no numbers")
    ids = {token: i for i, token in enumerate(tokens)}
    if missing := [byte for byte in BYTES if byte not in ids]:
        raise ValueError(f"its tokenizer lacks the token {missing[0]} for a byte, without which not every "
                         "text can be written")
    whole = [token for token in tokens if token not in special or SPACE in token]
    if out := [token for token in whole if _joins_no_token(token, ids)]:
        raise ValueError(f"its tokenizer has {out[0]!r}, but not every character of it as a token")
    merges = merges_by_score(whole, scores, ids)
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True))
    prefix = keys.get("add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def merges_by_score(tokens: list[str], scores: list[float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make one of `tokens` of two that `ids` has, the one to be preferred first.

    Of ways with one score, the longest left part comes first: so a run of spaces, whose lengths all have one
    score, is joined from its left. Raises ValueError where the order of other equal scores would matter.
    """
    found = []                               # (score, left, right)
    for token in tokens:
        found += [(scores[ids[token]], token[:i], token[i:]) for i in range(1, len(token))
                  if token[:i] in ids and token[i:] in ids]
    found.sort(key=lambda way: (-way[0], -len(way[1]), -len(way[2])))
    _check_ties(found)
    return [(left, right) for _, left, right in found]


def _joins_no_token(token, ids):
    """Would sentencepiece make this token of a character that is none? `tokenizers` makes it bytes first."""
    cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
    return any({len(part) for part in cut if part not in ids} == {1} for cut in cuts)


def _check_ties(found):
    """ValueError for a part that two tokens of one score would take, one as its end, one as its begin."""
    left_of = {}                             # (score, left part) -> a token that is no run of one character
    for score, left, right in found:
        if len(set(left + right)) > 1:
            left_of.setdefault((score, left), left + right)
    for score, left, right in found:
        other = left_of.get((score, right))
        if other and other != left + right:
            raise ValueError(f"its tokenizer gives {left + right!r} and {other!r} the same score {score}, so "
                             "that nothing says which one is joined first")
