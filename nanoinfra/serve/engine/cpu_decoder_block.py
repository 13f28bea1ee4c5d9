"""Decoder blocks for one CPU rank, by the decode kernels in C: four packed products and five passes each.

Attention reads keys and values in the blocks where they are: nothing gathers a sequence's blocks first. For
models of LLaMA's kind (RMSNorm, RoPE, SwiGLU; Qwen3's norms of queries and keys too) with packed weights. The
results are torch's but for the order of sums.
N tokens of the step, C width, F hidden width, H query heads, KV key heads, K head_dim.
"""
import ctypes

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.kernels.cpu.decode_kernels import compile_decode_kernels
from nanoinfra.model import decoder
from nanoinfra.model.attention import ForwardContext
from nanoinfra.model.layers import RMSNorm
from nanoinfra.model.ports import LinearPort
from nanoinfra.serve.engine.paged_attention import PagedKVCache

_NO_WINDOW = 1 << 40                         # tokens: a sliding window that hides nothing


class AddRMSNorm(nn.Module):
    """An addition and the RMSNorm after it, in one pass."""

    def __init__(self, norm: RMSNorm, kernels: ctypes.CDLL):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.kernels = kernels

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of `x` (1, N, C), to which `residual` is added first, in place."""
        y, added = torch.empty_like(x), None if residual is None else residual.data_ptr()
        self.kernels.add_rms_norm(x.data_ptr(), added, y.data_ptr(), self.weight.data_ptr(), *x.shape[1:],
                                  self.eps)
        return y


class CpuDecoderBlock(nn.Module):
    """A decoder.Block by the C kernels, made of the block whose ports are all packed, that it replaces.

    It computes the ports' products itself and calls no port, so none can be wrapped from then on.
    """

    def __init__(self, block: decoder.DecoderBlock, kernels: ctypes.CDLL):
        super().__init__()
        self.attn, self.mlp = attn, mlp = block.attn, block.mlp
        self.kernels = kernels
        self.norm1, self.norm2 = AddRMSNorm(block.norm1, kernels), AddRMSNorm(block.norm2, kernels)
        order = (self.norm1, attn.in_proj.product, attn.out_proj.product,
                 self.norm2, mlp.in_proj.product, mlp.out_proj.product)
        self.steps = [module.forward for module in order]                # a Module's own call takes 1 us more
        attn.in_proj = attn.out_proj = mlp.in_proj = mlp.out_proj = PortComputedByCpuBlock()

    def forward(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """`x` (1, N, C), whose memory is used again, -> (1, N, C). The context has a CpuPagedKVCache."""
        norm1, qkv_proj, o_proj, norm2, gate_up_proj, down_proj = self.steps
        qkv = qkv_proj(norm1(x))                                         # (1, N, (H + 2 KV) K)
        y = o_proj(context.cache.rope_cache_and_attend(self.attn, qkv, context.rope))    # (1, N, C)
        hidden = gate_up_proj(norm2(x, y))                               # (1, N, 2 F)
        y = hidden.new_empty(1, x.shape[1], hidden.shape[2] // 2)        # (1, N, F)
        self.kernels.swiglu(y.data_ptr(), hidden.data_ptr(), *y.shape[1:])
        return x.add_(down_proj(y))


class PortComputedByCpuBlock(LinearPort):
    """Sits where a CpuDecoderBlock computes a port's product without a call; no port can be put around it."""
    can_be_wrapped = False


class CpuPagedKVCache(PagedKVCache):
    """The paged KV cache of CpuDecoderBlocks; it takes over the memory of `kv_cache`."""

    def __init__(self, kv_cache: PagedKVCache, kernels: ctypes.CDLL):
        self.block_size, self.num_kv_heads = kv_cache.block_size, kv_cache.num_kv_heads
        self.kv_memory, self.kernels = kv_cache.kv_memory, kernels

    def rope_cache_and_attend(self, attn: nn.Module, qkv: torch.Tensor,
                              rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotate queries and keys (RoPE), store keys and values, and attend: (1, N, H K).

        A row of `qkv` (1, N, (H + 2 KV) K) holds a token's query heads, then its key heads, then its value
        heads.
        """
        memory, K = self.kv_memory[attn.layer], attn.head_dim
        _, N, width = qkv.shape
        H, n = width // K - 2 * self.num_kv_heads, memory.shape[1]       # n blocks
        norms, eps = [None, None], 0.0
        if attn.q_norm is not None:
            norms, eps = [attn.q_norm.weight.data_ptr(), attn.k_norm.weight.data_ptr()], attn.q_norm.eps
        self.kernels.rope_and_cache(qkv.data_ptr(), *norms, eps, rope[0].data_ptr(), rope[1].data_ptr(),
                                    memory.data_ptr(), self.slot_mapping.data_ptr(), N, n * self.block_size)
        parts = []
        if self.decode_metadata:
            tables, ends = self.decode_metadata
            parts.append(qkv.new_empty(len(ends), H, K))
            self.kernels.paged_attention(parts[0].data_ptr(), qkv.data_ptr(), memory.data_ptr(),
                                         tables.data_ptr(), ends.data_ptr(), *tables.shape, n,
                                         attn.mask.window or _NO_WINDOW)
        if self.prefill_chunks:
            heads = qkv[0].unflatten(1, (-1, K)).split([H, self.num_kv_heads, self.num_kv_heads], 1)
            parts += self._attend_prefill_chunks(memory, *heads, attn.mask)
        y = parts[0] if len(parts) == 1 else torch.cat(parts)                            # (N, H, K)
        return y.flatten(1)[None]

    def _build_decode_metadata(self, decodes):
        """Of [(block_table, S)]: the block tables (B, longest), each S (B,)."""
        longest = max(len(table) for table, _ in decodes)
        tables = [table + [0] * (longest - len(table)) for table, _ in decodes]
        return self._tensor(tables), self._tensor([S for _, S in decodes])


def supports_cpu_block(config: ModelConfig) -> bool:
    """Can CpuDecoderBlocks compute this model? It must have RMSNorm, RoPE and SwiGLU."""
    parts = config.architecture
    return (parts.norm_type, parts.position_encoding, parts.gated_mlp,
            config.mlp_activation) == ("rms", "rope", True, "silu")


def compile_kernels_for(model: decoder.Decoder, kv_cache: PagedKVCache) -> ctypes.CDLL:
    """Compile the decode kernels for `model` and its cache. RuntimeError without a C compiler with OpenMP."""
    dtype, config = model.embed.weight.dtype, model.config
    return compile_decode_kernels(dtype, K=config.head_dim, KV=kv_cache.num_kv_heads,
                                  G=config.heads // kv_cache.num_kv_heads, BLOCK=kv_cache.block_size)


def install_cpu_blocks(model: decoder.Decoder, kv_cache: PagedKVCache,
                       kernels: ctypes.CDLL) -> CpuPagedKVCache:
    """Replace the blocks of `model`, whose ports are all packed; returns the cache to use from now on."""
    model.blocks = nn.ModuleList(CpuDecoderBlock(block, kernels) for block in model.blocks)
    model.norm = AddRMSNorm(model.norm, kernels)
    return CpuPagedKVCache(kv_cache, kernels)
