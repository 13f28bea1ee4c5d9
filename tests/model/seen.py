"""Attention by hand: which key a query sees, said once more and slowly, and sums over those alone."""
import math

import torch

from nanoinfra.model.attention_mask import AttentionMask, alibi_slopes

SLOPES = alibi_slopes(6)                     # of the six query heads that these tests have
MASKS = {                                    # name: (mask, T, S)
    "causal": (AttentionMask(), 7, 7),
    "the queries are the last keys": (AttentionMask(), 3, 8),
    "one query": (AttentionMask(), 1, 8),
    "one query, one key": (AttentionMask(), 1, 1),
    "not causal": (AttentionMask(causal=False), 5, 8),
    "window": (AttentionMask(window=3), 9, 9),
    "window, last keys": (AttentionMask(window=4), 5, 9),
    "window of all": (AttentionMask(window=9), 9, 9),
    "window both ways": (AttentionMask(window=2, causal=False), 7, 7),
    "alibi": (AttentionMask(alibi_slopes=SLOPES), 7, 7),
    "alibi, last keys": (AttentionMask(alibi_slopes=SLOPES), 3, 8),
    "alibi, one query": (AttentionMask(alibi_slopes=SLOPES), 1, 8),
    "alibi both ways": (AttentionMask(alibi_slopes=SLOPES, causal=False), 5, 8),
    "alibi and window": (AttentionMask(3, SLOPES), 8, 8),
    "the same block": (AttentionMask(first_positions=(6, 6)), 4, 4),
    "an earlier block": (AttentionMask(first_positions=(6, 2)), 4, 4),
    "an earlier block, alibi": (AttentionMask(alibi_slopes=SLOPES, first_positions=(6, 2)), 4, 4),
    "a later block": (AttentionMask(first_positions=(2, 6)), 4, 4),
    "a later block, alibi": (AttentionMask(alibi_slopes=SLOPES, first_positions=(2, 6)), 4, 4),
    "blocks that overlap": (AttentionMask(first_positions=(3, 5)), 6, 4),
    "blocks that overlap, alibi": (AttentionMask(alibi_slopes=SLOPES, first_positions=(3, 5)), 6, 4),
    "a block at the window's end": (AttentionMask(window=3, first_positions=(5, 1)), 5, 4),
    "a block before the window": (AttentionMask(window=3, first_positions=(9, 1)), 5, 4),
    "documents": (AttentionMask(document_ends=(2, 3, 7)), 7, 7),
    "one document": (AttentionMask(document_ends=(7,)), 7, 7),
    "documents, last keys": (AttentionMask(document_ends=(3, 6, 9)), 5, 9),
    "documents, not causal": (AttentionMask(causal=False, document_ends=(3, 7)), 7, 7),
    "documents, window": (AttentionMask(window=2, document_ends=(5, 8)), 8, 8),
    "documents, alibi": (AttentionMask(alibi_slopes=SLOPES, document_ends=(5, 8)), 8, 8),
    "documents of a block": (AttentionMask(first_positions=(4, 2), document_ends=(3, 6, 20)), 6, 5),
    "another document's block": (AttentionMask(first_positions=(6, 0), document_ends=(5, 10)), 4, 4),
}


def sees(mask, query, key):
    """Whether the query at one position sees the key at another."""
    ends = mask.document_ends or ()
    ahead = key - query
    return (not (mask.causal and ahead > 0)
            and (mask.window is None or abs(ahead) < mask.window)
            and sum(end <= query for end in ends) == sum(end <= key for end in ends))


def seen_keys(mask, T, S):
    """For each query the list of keys that it sees, by index; and each query's distances from all keys."""
    first_query, first_key = (S - T, 0) if mask.first_positions is None else mask.first_positions
    places = [(first_query + t, [first_key + s for s in range(S)]) for t in range(T)]
    seen = [[s for s, key in enumerate(keys) if sees(mask, query, key)] for query, keys in places]
    return seen, [[abs(query - key) for key in keys] for query, keys in places]


def attention_by_hand(q, k, v, mask):
    """(y, lse), query by query and head by head, differentiable; 0 and -inf where nothing is seen."""
    (B, H, T, K), (KV, S) = q.shape, k.shape[1:3]
    seen, distances = seen_keys(mask, T, S)
    slopes = mask.alibi_slopes or (0.0,) * H
    y, lse = [], []
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        if not seen[t]:
            y.append(q.new_zeros(v.shape[-1]))
            lse.append(q.new_tensor(-math.inf))
            continue
        keys, values = (x[b, h // (H // KV), seen[t]] for x in (k, v))
        far = q.new_tensor([distances[t][s] for s in seen[t]])
        scores = keys @ q[b, h, t] / math.sqrt(K) - slopes[h] * far
        lse.append(scores.logsumexp(0))
        y.append(scores.softmax(0) @ values)
    return torch.stack(y).view(B, H, T, -1), torch.stack(lse).view(B, H, T)


def draw_heads(T, S, dtype=torch.float64, KV=3, K=4):
    """q, k, v and a gradient of the output, for six query heads."""
    draws = torch.Generator().manual_seed(0)
    shapes = (6, T), (KV, S), (KV, S), (6, T)
    return [torch.randn(2, *shape, K, generator=draws, dtype=torch.float64).to(dtype) for shape in shapes]
