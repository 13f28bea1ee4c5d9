"""Paged attention: keys and values of all sequences in one pool of blocks, found through block tables.

The tokens of a step are one row, (1, N): first those of decoding sequences (one token each), then longer
prefill chunks. For the first, all their blocks are gathered, a head's together and padded to the longest
sequence, so that one call attends for all; a chunk attends to its own tokens and the blocks before by the
plain core. The slot mapping says where a token is
written. The pool holds 2 L KV K numbers a token. PagedAttention: Kwon et al. 2023.
N tokens of the step, H query heads, KV key heads, G = H/KV, K head_dim, S keys, B sequences, p block size.
"""
import math

import torch
import torch.nn.functional as F

from nanoinfra.model.attention_cores import sdpa_attention
from nanoinfra.model.attention_mask import CAUSAL_MASK, AttentionMask
from nanoinfra.model.decoder import Decoder
from nanoinfra.model.layers import at_least_float32
from nanoinfra.serve.engine.scheduler import SchedulerOutput, Sequence


class PagedKVCache:
    """The keys and values of `num_blocks` blocks of `block_size` tokens for `model`,
    or this rank's heads of it.

    A decoder takes it as its `cache` argument, after `prepare_inputs` has told it what the step computes.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int):
        weight, K = model.blocks[0].attn.k.weight, model.config.head_dim
        self.block_size, self.num_kv_heads = block_size, weight.shape[0] // K
        self.kv_memory = weight.new_zeros(len(model.blocks), 2 * self.num_kv_heads, num_blocks, block_size,
                                          K)                                             # (L, 2 KV, n, p, K)

    def prepare_inputs(self, scheduled: SchedulerOutput
                       ) -> tuple[list[tuple[Sequence, int, int]], torch.Tensor, torch.Tensor]:
        """Copy and clear blocks for a step, and find its keys. Returns (chunks, tokens, positions).

        Tokens and positions are (1, N). Chunks come as the row has them, each as (sequence, first token,
        number of tokens).
        """
        for source, to in scheduled.blocks_to_copy:
            self.kv_memory[:, :, to] = self.kv_memory[:, :, source]
        self._zero_new_blocks(scheduled.scheduled_chunks)
        chunks = sorted(scheduled.scheduled_chunks, key=lambda chunk: chunk[2] > 1)      # stable
        positions = [range(first, first + count) for _, first, count in chunks]
        slots = [sequence.block_table[i // self.block_size] * self.block_size + i % self.block_size
                 for (sequence, _, _), span in zip(chunks, positions) for i in span]
        tokens = [token for sequence, first, count in chunks
                  for token in sequence.tokens[first:first + count]]
        self.slot_mapping = self._tensor(slots)                                          # (N,)
        decodes = [(sequence.block_table, first + 1) for sequence, first, count in chunks if count == 1]
        self.decode_metadata = self._build_decode_metadata(decodes) if decodes else None
        self.prefill_chunks = self._group_chunks(chunks[len(decodes):], len(decodes))
        return chunks, self._tensor([tokens]), self._tensor([[i for span in positions for i in span]])

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               mask: AttentionMask = CAUSAL_MASK) -> torch.Tensor:
        """Store `k`, `v` (1, KV, N, K) by the slot_mapping, and attend for `q` (1, H, N, K): (1, H, N, K).

        A query sees the keys of its own sequence so far, as far as `mask` says.
        """
        memory = self.kv_memory[layer]                                                   # (2 KV, n, p, K)
        memory.flatten(1, 2).index_copy_(1, self.slot_mapping, torch.cat([k[0], v[0]]))
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                              # (N, heads, K)
        parts = [self._attend_decodes(memory, q, mask)] if self.decode_metadata else []
        y = torch.cat(parts + self._attend_prefill_chunks(memory, q, k, v, mask))        # (N, H, K)
        return y.transpose(0, 1)[None]

    def _attend_prefill_chunks(self, memory, q, k, v, mask):
        """Attention of each chunk's queries, of `q` (N, H, K) and `k`, `v` (N, KV, K): [(B T, H, K)]."""
        parts = []
        for begin, sequences, count, blocks, S in self.prefill_chunks:
            queries, keys, values = (x[begin:begin + sequences * count].unflatten(0, (sequences, count))
                                     .transpose(1, 2) for x in (q, k, v))                # (B, heads, T, K)
            if blocks is not None:
                keys, values = memory.index_select(1, blocks).flatten(1, 2)[None, :, :S].chunk(2, 1)
            y = sdpa_attention(queries, keys, values, mask)                  # (B, H, T, K)
            parts.append(y.transpose(1, 2).flatten(0, 1))
        return parts

    def _attend_decodes(self, memory, q, mask):
        """Attention of decoding sequences: (B, H, K). A head's G queries attend as if they were G tokens."""
        index, bias, offsets = self.decode_metadata                                      # (B, 1, 1, S)
        queries = q[:len(bias)].unflatten(1, (self.num_kv_heads, -1))                    # (B, KV, G, K)
        both = memory.flatten(0, 1).flatten(1).index_select(0, index)
        keys, values = both.view(2, self.num_kv_heads, len(bias), -1,
                                 q.shape[-1]).transpose(1, 2)                            # (B, KV, S, K)
        if mask.window is not None:
            bias = bias.masked_fill(offsets < -mask.window, -math.inf)
        if mask.alibi_slopes is not None:
            slopes = torch.tensor(mask.alibi_slopes, dtype=at_least_float32(q.dtype),
                                  device=q.device)
            bias = (bias + slopes.view(self.num_kv_heads, -1, 1) * offsets).to(q.dtype)  # (B, KV, G, S)
        return F.scaled_dot_product_attention(queries, keys, values, bias).flatten(1, 2)

    def _build_decode_metadata(self, decodes):
        """Of [(block_table, S)]: pool rows to gather, a bias that is -inf past S, each key's place less S."""
        longest = max(len(table) for table, _ in decodes)
        padded = [table + [table[-1]] * (longest - len(table)) for table, _ in decodes]
        tables = self._tensor(padded).flatten()                                          # (B blocks,)
        heads = torch.arange(2 * self.num_kv_heads, device=tables.device) * self.kv_memory.shape[2]
        index = (heads[:, None] + tables).flatten()                                      # (2 KV B blocks,)
        ends = self._tensor([[S] for _, S in decodes])                                   # (B, 1)
        offsets = torch.arange(longest * self.block_size, device=tables.device) - ends   # (B, S)
        bias = torch.zeros(offsets.shape, dtype=self.kv_memory.dtype, device=tables.device)
        bias.masked_fill_(offsets >= 0, -math.inf)
        return index, bias[:, None, None], offsets[:, None, None]                        # (B, 1, 1, S)

    def _group_chunks(self, chunks, begin):
        """[(first row, sequences, tokens of each, blocks or None, keys)]; equally long prompts together."""
        groups = []
        for sequence, first, count in chunks:
            alike = groups and groups[-1][3] is None and not first and groups[-1][2] == count
            if alike:
                groups[-1][1] += 1
            else:
                blocks = self._tensor(sequence.block_table) if first else None
                groups.append([begin, 1, count, blocks, first + count])
            begin += count
        return groups

    def _zero_new_blocks(self, chunks):
        """Clear blocks that the step begins and does not fill: a NaN past the end stays one when masked."""
        begun = []
        for sequence, first, count in chunks:
            block, past = divmod(first + count, self.block_size)
            if past and first <= block * self.block_size:    # begun in this step, and not filled
                begun.append(sequence.block_table[block])
        if begun:
            self.kv_memory.index_fill_(2, self._tensor(begun), 0)

    def _tensor(self, values):
        return torch.tensor(values, device=self.kv_memory.device)
