"""What lies between the products, in one pass over memory each: passes.c, compiled when a model is opened.

Where few tokens are computed, the 82 operations of a layer in torch cost as much as reading its weights. Here
a layer is four products and five passes, and attention reads keys and values in the pages where they lie:
nothing puts a sequence's together first. For blocks of LLaMA's kind (RMSNorm, RoPE, SwiGLU; Qwen3's
norms of queries and keys too) with packed weights. What comes out is the same but for the order of sums.
N tokens of the step, C width, F hidden width, H query heads, KV key heads, K head_dim.
"""
import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

from nanoinfra.formulas.shape import ModelConfig
from nanoinfra.model import decoder
from nanoinfra.model.layers import RMSNorm
from nanoinfra.serve.paged import PagedKV

EVERYTHING = 1 << 40                         # tokens: a window that hides nothing
POINTER, LONG, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
ARGUMENTS = {"add_norm": [POINTER] * 4 + [LONG] * 2 + [DOUBLE],
             "swiglu": [POINTER] * 2 + [LONG] * 2,
             "place": [POINTER] * 3 + [DOUBLE] + [POINTER] * 4 + [LONG] * 2,
             "attend": [POINTER] * 5 + [LONG] * 4,
             "likeliest": [POINTER] * 2 + [LONG] * 2,
             "gemv": [POINTER] * 4 + [LONG] * 2,
             "instructions": []}


def compiled(dtype: torch.dtype, **defined: int) -> ctypes.CDLL:
    """passes.c for numbers of `dtype`, bfloat16 or float32, with these names defined.

    By $CC or cc, for this processor unless $CFLAGS says otherwise (-march=haswell). Raises RuntimeError where
    there is no C compiler with OpenMP, or no folder from which code may be loaded.
    """
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC"]
    flags += shlex.split(os.environ.get("CFLAGS", ""))                   # the last -march counts
    flags += [f"-D{name}={value}" for name, value in defined.items()]
    flags += ["-DBF16"] if dtype == torch.bfloat16 else []
    passes = _loaded(flags)
    for name, arguments in ARGUMENTS.items():
        getattr(passes, name).argtypes, getattr(passes, name).restype = arguments, None
    passes.instructions.restype = ctypes.c_char_p
    return passes


def _loaded(flags):
    """The library, from the first folder from which code may be loaded."""
    said = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                return ctypes.CDLL(str(_compile(flags, Path(own))))
        except OSError as error:
            said.append(f"{folder} ({error.strerror or str(error).rpartition(': ')[2]})")
    raise RuntimeError(f"code cannot be loaded from {' or '.join(said)}; set TMPDIR to a folder that is not "
                       "mounted noexec")


def _folders():
    yield Path(tempfile.gettempdir())        # may be mounted noexec
    yield Path.home() / ".cache" / "nanoinfra"


def _compile(flags, folder):
    source, compiler = Path(__file__).with_suffix(".c"), os.environ.get("CC", "cc")
    middle, library = folder / "passes.o", folder / "passes.so"
    to_object = ["-c", *flags, source, "-o", middle]
    to_library = ["-shared", "-fopenmp", middle, "-o", library, "-lm"]
    try:                                     # in two steps: a linker told of -ffast-math sets it for all
        for step in to_object, to_library:
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{compiler}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} does not compile {source.name}: {error.stderr}") from error
    return library


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


def likeliest(passes: ctypes.CDLL, logits: torch.Tensor) -> list[int]:
    """engine.likeliest of `logits` (N, V)."""
    found = torch.empty(len(logits), dtype=torch.int64)
    passes.likeliest(found.data_ptr(), logits.data_ptr(), *logits.shape)
    return found.tolist()


def suit(config: ModelConfig) -> bool:
    """Is it a model of this kind?"""
    parts = config.parts
    return (parts.norm, parts.position, parts.gated, config.act) == ("rms", "rope", True, "silu")


def compile_for(model: decoder.Decoder, kv: PagedKV) -> ctypes.CDLL:
    """passes.c for `model` and its cache. Raises RuntimeError where there is no C compiler with OpenMP."""
    dtype, config = model.embed.weight.dtype, model.config
    return compiled(dtype, K=config.head_dim, KV=kv.KV, G=config.heads // kv.KV, BLOCK=kv.size)


def install(model: decoder.Decoder, kv: PagedKV, passes: ctypes.CDLL) -> PagesInPlace:
    """Let `model`, packed, compute so from here on, with the cache that is returned in `kv`'s place."""
    model.blocks = nn.ModuleList(Block(block, passes) for block in model.blocks)
    model.norm = Norm(model.norm, passes)
    return PagesInPlace(kv, passes)
