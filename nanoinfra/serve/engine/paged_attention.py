"""Paged attention: keys and values of all sequences in one pool of blocks, found through block tables.

A step's tokens are one row, (1, N): first those of sequences with one token to compute, then longer chunks.
For the first, all their blocks are gathered, a head's together and padded to the longest, so that one call
attends for all; a chunk sees its own tokens and the blocks before by the plain core. The pool holds
2 L KV K numbers a token. It is what a decoder takes as `cache`: paging is a property of the call, not of the
model. PagedAttention: Kwon et al. 2023.
N tokens of the step, H query heads, KV key heads, G = H/KV, K head_dim, S keys, B sequences, p block size.
"""
import math

import torch
import torch.nn.functional as F

from nanoinfra.model.attention import CAUSAL, Mask, sdpa
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.layers import wide
from nanoinfra.serve.engine.scheduler import Plan, Sequence


class PagedKV:
    """`n` blocks of `size` tokens for `model`, or the part of it that this rank has."""

    def __init__(self, model: Decoder, n: int, size: int):
        weight, K = model.blocks[0].attn.k.weight, model.config.head_dim
        self.size, self.KV = size, weight.shape[0] // K
        self.pool = weight.new_zeros(len(model.blocks), 2 * self.KV, n, size, K)         # (L, 2 KV, n, p, K)

    def begin(self, plan: Plan) -> tuple[list[tuple[Sequence, int, int]], torch.Tensor, torch.Tensor]:
        """Prepare for a step: (its work in the order of the row, tokens (1, N), positions (1, N))."""
        for source, to in plan.copies:
            self.pool[:, :, to] = self.pool[:, :, source]
        self._clean(plan.work)
        work = sorted(plan.work, key=lambda each: each[2] > 1)                           # stable
        places = [range(first, first + count) for _, first, count in work]
        slots = [sequence.table[i // self.size] * self.size + i % self.size
                 for (sequence, _, _), span in zip(work, places) for i in span]
        tokens = [token for sequence, first, count in work for token in sequence.tokens[first:first + count]]
        self.slots = self._tensor(slots)                                                 # (N,)
        ones = [(sequence.table, first + 1) for sequence, first, count in work if count == 1]
        self.ones = self.find(ones) if ones else None
        self.chunks = self._chunks(work[len(ones):], len(ones))
        return work, self._tensor([tokens]), self._tensor([[i for span in places for i in span]])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               mask: Mask = CAUSAL) -> torch.Tensor:
        """Keep `k`, `v` (1, KV, N, K); let `q` (1, H, N, K) see of its sequence so far what `mask` says."""
        memory = self.pool[layer]                                                        # (2 KV, n, p, K)
        memory.flatten(1, 2).index_copy_(1, self.slots, torch.cat([k[0], v[0]]))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                              # (N, heads, K)
        parts = [self._see_ones(memory, q, mask)] if self.ones else []
        y = torch.cat(parts + self.see_chunks(memory, q, k, v, mask))                    # (N, H, K)
        return y.transpose(0, 1)[None]

    def see_chunks(self, memory, q, k, v, mask):
        """What each chunk's queries see, of `q` (N, H, K) and `k`, `v` (N, KV, K): [(B T, H, K)]."""
        parts = []
        for begin, sequences, count, blocks, S in self.chunks:
            queries, keys, values = (x[begin:begin + sequences * count].unflatten(0, (sequences, count))
                                     .transpose(1, 2) for x in (q, k, v))                # (B, heads, T, K)
            if blocks is not None:
                keys, values = memory.index_select(1, blocks).flatten(1, 2)[None, :, :S].chunk(2, 1)
            y = sdpa(queries, keys, values, mask)                                        # (B, H, T, K)
            parts.append(y.transpose(1, 2).flatten(0, 1))
        return parts

    def _see_ones(self, memory, q, mask):
        """A head's G queries are taken for a sequence's, which see its keys, or the window's: (B, H, K)."""
        index, bias, places = self.ones                                                  # (B, 1, 1, S)
        queries = q[:len(bias)].unflatten(1, (self.KV, -1))                              # (B, KV, G, K)
        both = memory.flatten(0, 1).flatten(1).index_select(0, index)
        keys, values = both.view(2, self.KV, len(bias), -1, q.shape[-1]).transpose(1, 2)  # (B, KV, S, K)
        if mask.window is not None:
            bias = bias.masked_fill(places < -mask.window, -math.inf)
        if mask.slopes is not None:
            steep = torch.tensor(mask.slopes, dtype=wide(q.dtype), device=q.device).view(self.KV, -1, 1)
            bias = (bias + steep * places).to(q.dtype)                                   # (B, KV, G, S)
        return F.scaled_dot_product_attention(queries, keys, values, bias).flatten(1, 2)

    def find(self, ones):
        """Where the keys of [(table, S)] are: rows of the pool, head by head; -inf past S; places less S."""
        longest = max(len(table) for table, _ in ones)
        padded = [table + [table[-1]] * (longest - len(table)) for table, _ in ones]
        tables = self._tensor(padded).flatten()                                          # (B blocks,)
        heads = torch.arange(2 * self.KV, device=tables.device) * self.pool.shape[2]
        index = (heads[:, None] + tables).flatten()                                      # (2 KV B blocks,)
        ends = self._tensor([[S] for _, S in ones])                                      # (B, 1)
        places = torch.arange(longest * self.size, device=tables.device) - ends          # (B, S)
        mask = torch.zeros(places.shape, dtype=self.pool.dtype, device=tables.device)
        mask.masked_fill_(places >= 0, -math.inf)
        return index, mask[:, None, None], places[:, None, None]                         # (B, 1, 1, S)

    def _chunks(self, work, begin):
        """(first row, sequences, tokens of each, blocks or None, keys), prompts of one length together."""
        found = []
        for sequence, first, count in work:
            alike = found and found[-1][3] is None and not first and found[-1][2] == count
            if alike:
                found[-1][1] += 1
            else:
                blocks = self._tensor(sequence.table) if first else None
                found.append([begin, 1, count, blocks, first + count])
            begin += count
        return found

    def _clean(self, work):
        """Past a sequence's end lie zeros, nobody else's numbers: a NaN is still one when it is masked."""
        begun = []
        for sequence, first, count in work:
            block, past = divmod(first + count, self.size)
            if past and first <= block * self.size:          # begun in this step, and not filled
                begun.append(sequence.table[block])
        if begun:
            self.pool.index_fill_(2, self._tensor(begun), 0)

    def _tensor(self, values):
        return torch.tensor(values, device=self.pool.device)
