"""Which keys a query sees, in spans and integers: no tensor is needed to tell which blocks can be skipped.

Causal: keys up to the query's own. Sliding window (Jiang et al. 2023): the last W tokens, the query included.
ALiBi (Press et al. 2022): a score falls by its head's slope for each token of distance. Packed documents: a
query sees only keys of its own document. All of them count by position, so a block of queries and a block of
keys from anywhere in a sequence have a mask too (ring attention, Liu et al. 2023).
T query tokens, S key tokens, H query heads.
"""
import math
from bisect import bisect_right
from functools import lru_cache
from typing import Literal, NamedTuple

import torch


class AttentionMask(NamedTuple):
    """The mask of an attention call. Without `causal`, the window and ALiBi reach as far ahead as back."""
    window: int | None = None                # tokens that a query sees, itself included; None: all before it
    alibi_slopes: tuple[float, ...] | None = None  # one for each query head; None: no ALiBi
    causal: bool = True                      # a query sees no later key
    first_positions: tuple[int, int] | None = None  # of queries, of keys; None: the queries are the last keys
    document_ends: tuple[int, ...] | None = None  # positions where packed documents end; None: one document


CAUSAL_MASK = AttentionMask()
MaskKind = Literal["all", "diagonal", "none", "mixed"]
_SHARED_NUMBERS = 2 ** 18                    # a mask of so many numbers, 1 MiB in float32, is kept


def mask_kind(mask: AttentionMask, T: int, S: int) -> MaskKind:
    """What T queries see of S keys, from the spans alone.

    "all": every query sees every key; "diagonal": query t sees keys 0..t, and T = S; "none": no query sees a
    key; "mixed": anything else. ALiBi does not count, because it hides no key.
    """
    queries, keys = query_and_key_positions(mask, T, S)
    if S and seen_key_span(mask, queries[-1])[0] <= keys.start:          # the last query sees fewest old keys
        if seen_key_span(mask, queries[0])[1] >= keys.stop:              # the first one fewest new keys
            return "all"
        if mask.causal and queries == keys:
            return "diagonal"
    parts = split_by_document(mask, T, S)
    seen = any(_sees_a_key(part, rows.stop - rows.start, columns.stop - columns.start)
               for rows, columns, part in parts)
    return "mixed" if seen else "none"


def query_and_key_positions(mask: AttentionMask, T: int, S: int) -> tuple[range, range]:
    """The positions of the T queries and of the S keys."""
    first_query, first_key = mask.first_positions or (S - T, 0)
    return range(first_query, first_query + T), range(first_key, first_key + S)


def seen_key_span(mask: AttentionMask, position: int) -> tuple[float, float]:
    """The keys that the query at `position` sees, wherever they are: (first position, end)."""
    first, end = _document_span(mask, position)
    reach = math.inf if mask.window is None else mask.window
    return max(first, position - reach + 1), min(end, position + (1 if mask.causal else reach))


def split_by_document(mask: AttentionMask, T: int, S: int) -> list[tuple[slice, slice, AttentionMask]]:
    """Cut T queries and S keys by document: [(queries, keys, mask of these alone)]; the keys may be none."""
    queries, keys = query_and_key_positions(mask, T, S)
    found, begin = [], queries.start
    while begin < queries.stop:
        start, end = _document_span(mask, begin)
        stop = min(end, queries.stop)
        first = min(max(start, keys.start), keys.stop)
        last = max(min(end, keys.stop), first)
        part = mask._replace(document_ends=None, first_positions=(begin, first))
        found.append((slice(begin - queries.start, stop - queries.start),
                      slice(first - keys.start, last - keys.start), part))
        begin = stop
    return found


def every_query_sees_itself(mask: AttentionMask, T: int, S: int) -> bool:
    """Whether all queries are among the keys. If not, some of them may see nothing."""
    queries, keys = query_and_key_positions(mask, T, S)
    return keys.start <= queries.start and queries.stop <= keys.stop


def hidden_key_mask(mask: AttentionMask, T: int, S: int, device: torch.device) -> torch.Tensor:
    """A mask (T, S), true where a key is hidden from a query."""
    queries, keys = _position_tensors(mask, T, S, device)                 # (T, 1), (S,)
    hidden = keys > queries if mask.causal else torch.zeros(T, S, dtype=torch.bool, device=device)
    if mask.window is not None:
        hidden = hidden | (keys <= queries - mask.window)
        hidden = hidden if mask.causal else hidden | (keys >= queries + mask.window)
    if mask.document_ends is not None:
        ends = torch.tensor(mask.document_ends, device=device)
        hidden = hidden | (torch.bucketize(keys, ends, right=True)
                           != torch.bucketize(queries, ends, right=True))
    return hidden


def additive_mask(mask: AttentionMask, T: int, S: int, dtype: torch.dtype,
                  device: torch.device) -> torch.Tensor:
    """What is added to scores: -inf for hidden keys, else ALiBi's bias (1, H, T, S) or 0 (T, S).

    It is read-only: the last four small ones, of 2^18 numbers at most, are kept and given again.
    """
    is_small = T * S * len(mask.alibi_slopes or (0,)) <= _SHARED_NUMBERS
    return (_shared_mask if is_small else _make_additive_mask)(mask, T, S, dtype, device)


@torch.inference_mode(False)
def _make_additive_mask(mask, T, S, dtype, device):
    hidden = hidden_key_mask(mask, T, S, device)
    if mask.alibi_slopes is None:
        return torch.zeros(T, S, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
    return alibi_bias(mask, T, S, dtype, device).masked_fill_(hidden, -math.inf).unsqueeze(0)


_shared_mask = lru_cache(maxsize=4)(_make_additive_mask)


def alibi_bias(mask: AttentionMask, T: int, S: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """ALiBi's bias (H, T, S): minus the slope times the distance. `dtype` is at least float32.

    With a causal mask, later keys, which it hides, have some number.
    """
    queries, keys = (x.to(dtype) for x in _position_tensors(mask, T, S, device))
    distance = keys - queries if mask.causal else -(keys - queries).abs() # (T, S), 0 or less where it is seen
    return torch.tensor(mask.alibi_slopes, dtype=dtype, device=device).view(-1, 1, 1) * distance


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The ALiBi slope of each head: 2^(-8 h/n) for h = 1..n, where the number of heads n is a power of two.

    For another number, as in BLOOM: the slopes of the next smaller power of two, then every second slope of
    the next larger one.
    """
    n = 2 ** (heads.bit_length() - 1)
    ladder = [2.0 ** (-8 * h / n) for h in range(1, n + 1)]
    return (*ladder, *(2.0 ** (-4 * h / n) for h in range(1, 2 * (heads - n), 2)))


def _document_span(mask, position):
    """(first position, end) of the document at `position`; without documents it has no bounds."""
    ends = mask.document_ends or ()
    i = bisect_right(ends, position)
    return ends[i - 1] if i else -math.inf, ends[i] if i < len(ends) else math.inf


def _sees_a_key(mask, T, S):
    """Whether one of T queries of a single document sees one of S keys.

    Each query's span holds its own position, so together they are one span without holes.
    """
    queries, keys = query_and_key_positions(mask, T, S)
    first, end = seen_key_span(mask, queries[0])[0], seen_key_span(mask, queries[-1])[1]
    return S > 0 and first < keys.stop and keys.start < end


def _position_tensors(mask, T, S, device):
    """The positions of queries (T, 1) and of keys (S,)."""
    queries, keys = (torch.arange(span.start, span.stop, device=device)
                     for span in query_and_key_positions(mask, T, S))
    return queries.unsqueeze(-1), keys
