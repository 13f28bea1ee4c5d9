"""What lies between the products, in one pass over memory each: decode.c, compiled when a model is opened.

Where few tokens are computed, the 82 operations of a layer in torch cost as much as reading its weights. Here
a layer is four products and five passes, and attention reads keys and values in the pages where they lie:
nothing puts a sequence's together first. For blocks of LLaMA's kind (RMSNorm, RoPE, SwiGLU; Qwen3's
norms of queries and keys too) with packed weights. What comes out is the same but for the order of sums.
N tokens of the step, C width, F hidden width, H query heads, KV key heads, K head_dim.
"""
import ctypes

import torch
from torch import nn

from nanoinfra.config import ModelConfig
from nanoinfra.kernels.cpu.decode_kernels import compiled
from nanoinfra.model import decoder
from nanoinfra.model.layers import RMSNorm
from nanoinfra.serve.engine.paged_attention import PagedKV

EVERYTHING = 1 << 40                         # tokens: a window that hides nothing


class Norm(nn.Module):
    """RMSNorm, and the sum before it."""

    def __init__(self, norm: RMSNorm, passes: ctypes.CDLL):
        super().__init__()
        self.weight, self.eps, self.passes = norm.weight, norm.eps, passes

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        """The norm of `x` (1, N, C), to which `more` is added first, in place."""
        y, more = torch.empty_like(x), None if more is None else more.data_ptr()
        self.passes.add_norm(x.data_ptr(), more, y.data_ptr(), self.weight.data_ptr(), *x.shape[1:], self.eps)
        return y


class Block(nn.Module):
    """decoder.Block, made of the packed one that it replaces."""

    def __init__(self, block: decoder.Block, passes: ctypes.CDLL):
        super().__init__()
        self.attn, self.mlp, self.passes = block.attn, block.mlp, passes
        attn, mlp = block.attn, block.mlp
        self.norm1, self.norm2 = Norm(block.norm1, passes), Norm(block.norm2, passes)
        order = (self.norm1, attn.qkv, attn.o, self.norm2, mlp.gate_up, mlp.down)
        self.steps = [module.forward for module in order]                # a Module's own call takes 1 us more

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor],
                cache: "PagesInPlace") -> torch.Tensor:
        """`x` (1, N, C), whose memory is used again, -> (1, N, C)."""
        norm1, read, write, norm2, gate_up, down = self.steps
        qkv = read(norm1(x))                                             # (1, N, (H + 2 KV) K)
        y = write(cache.see(self.attn, qkv, rope))                       # (1, N, C)
        hidden = gate_up(norm2(x, y))                                    # (1, N, 2 F)
        y = hidden.new_empty(1, x.shape[1], hidden.shape[2] // 2)        # (1, N, F)
        self.passes.swiglu(y.data_ptr(), hidden.data_ptr(), *y.shape[1:])
        return x.add_(down(y))


class PagesInPlace(PagedKV):
    """The cache of such blocks, which takes the place of `kv`."""

    def __init__(self, kv: PagedKV, passes: ctypes.CDLL):
        self.size, self.KV, self.pool, self.passes = kv.size, kv.KV, kv.pool, passes

    def see(self, attn: nn.Module, qkv: torch.Tensor,
            rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What the step's queries see: (1, N, H K), of rows `qkv` (1, N, (H + 2 KV) K), not yet rotated."""
        memory, K, (_, N, width) = self.pool[attn.layer], attn.head_dim, qkv.shape
        H, n = width // K - 2 * self.KV, memory.shape[1]                 # n blocks
        norms, eps = [None, None], 0.0
        if attn.q_norm is not None:
            norms, eps = [attn.q_norm.weight.data_ptr(), attn.k_norm.weight.data_ptr()], attn.q_norm.eps
        self.passes.place(qkv.data_ptr(), *norms, eps, rope[0].data_ptr(), rope[1].data_ptr(),
                          memory.data_ptr(), self.slots.data_ptr(), N, n * self.size)
        parts = []
        if self.ones:
            tables, ends = self.ones
            parts.append(qkv.new_empty(len(ends), H, K))
            self.passes.attend(parts[0].data_ptr(), qkv.data_ptr(), memory.data_ptr(), tables.data_ptr(),
                               ends.data_ptr(), *tables.shape, n, attn.mask.window or EVERYTHING)
        if self.chunks:
            heads = qkv[0].unflatten(1, (-1, K)).split([H, self.KV, self.KV], 1)
            parts += self.see_chunks(memory, *heads, attn.mask)
        y = parts[0] if len(parts) == 1 else torch.cat(parts)                            # (N, H, K)
        return y.flatten(1)[None]

    def find(self, ones):
        """Where the keys of [(table, S)] are: tables (B, longest), each S (B,)."""
        longest = max(len(table) for table, _ in ones)
        tables = [table + [0] * (longest - len(table)) for table, _ in ones]
        return self._tensor(tables), self._tensor([S for _, S in ones])


def suit(config: ModelConfig) -> bool:
    """Is it a model of this kind?"""
    parts = config.parts
    return (parts.norm, parts.position, parts.gated, config.act) == ("rms", "rope", True, "silu")


def compile_for(model: decoder.Decoder, kv: PagedKV) -> ctypes.CDLL:
    """decode.c for `model` and its cache. Raises RuntimeError where there is no C compiler with OpenMP."""
    dtype, config = model.embed.weight.dtype, model.config
    return compiled(dtype, K=config.head_dim, KV=kv.KV, G=config.heads // kv.KV, BLOCK=kv.size)


def install(model: decoder.Decoder, kv: PagedKV, passes: ctypes.CDLL) -> PagesInPlace:
    """Let `model`, packed, compute so from here on, with the cache that is returned in `kv`'s place."""
    model.blocks = nn.ModuleList(Block(block, passes) for block in model.blocks)
    model.norm = Norm(model.norm, passes)
    return PagesInPlace(kv, passes)
