"""Decode kernels in C for a CPU (decode.c), compiled when a model is opened: all between a layer's products.

Where few tokens are computed, the 82 operations of a layer in torch cost as much as reading its weights; each
of these kernels does several operations in one pass over memory. `decode.c` says of each which torch code it
replaces. What comes out is the same but for the order of sums.
"""
import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

_POINTER = ctypes.c_void_p
_LONG = ctypes.c_long
_DOUBLE = ctypes.c_double
_ARGUMENT_TYPES = {"add_rms_norm": [_POINTER] * 4 + [_LONG] * 2 + [_DOUBLE],
                   "swiglu": [_POINTER] * 2 + [_LONG] * 2,
                   "rope_and_cache": [_POINTER] * 3 + [_DOUBLE] + [_POINTER] * 4 + [_LONG] * 2,
                   "paged_attention": [_POINTER] * 5 + [_LONG] * 4,
                   "argmax": [_POINTER] * 2 + [_LONG] * 2,
                   "gemv": [_POINTER] * 4 + [_LONG] * 2,
                   "instruction_set": []}


def compile_decode_kernels(dtype: torch.dtype, **macros: int) -> ctypes.CDLL:
    """Compile decode.c for numbers of `dtype`, bfloat16 or float32, with these macros: K, KV, G, BLOCK.

    By $CC or cc, for this processor unless $CFLAGS says otherwise (-march=haswell). Raises RuntimeError where
    there is no C compiler with OpenMP, or no folder from which code may be loaded.
    """
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC"]
    flags += shlex.split(os.environ.get("CFLAGS", ""))                   # the last -march counts
    flags += [f"-D{name}={value}" for name, value in macros.items()]
    flags += ["-DBF16"] if dtype == torch.bfloat16 else []
    kernels = _load(flags)
    for name, argument_types in _ARGUMENT_TYPES.items():
        getattr(kernels, name).argtypes, getattr(kernels, name).restype = argument_types, None
    kernels.instruction_set.restype = ctypes.c_char_p
    return kernels


def argmax_with_kernels(kernels: ctypes.CDLL, logits: torch.Tensor) -> list[int]:
    """The likeliest token of each row of `logits` (N, V), as engine.argmax_tokens has it."""
    found = torch.empty(len(logits), dtype=torch.int64)
    kernels.argmax(found.data_ptr(), logits.data_ptr(), *logits.shape)
    return found.tolist()


def _load(flags):
    """The library, from the first folder from which code may be loaded."""
    refusals = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as own:
                return ctypes.CDLL(str(_compile(flags, Path(own))))
        except OSError as error:
            refusals.append(f"{folder} ({error.strerror or str(error).rpartition(': ')[2]})")
    raise RuntimeError(f"code cannot be loaded from {' or '.join(refusals)}; set TMPDIR to a folder that is "
                       "not mounted noexec")


def _folders():
    yield Path(tempfile.gettempdir())        # may be mounted noexec
    yield Path.home() / ".cache" / "nanoinfra"


def _compile(flags, folder):
    source, compiler = Path(__file__).with_name("decode.c"), os.environ.get("CC", "cc")
    objects, library = folder / "decode.o", folder / "decode.so"
    to_object = ["-c", *flags, source, "-o", objects]
    to_library = ["-shared", "-fopenmp", objects, "-o", library, "-lm"]
    try:                                     # in two steps: a linker told of -ffast-math sets it for all
        for step in to_object, to_library:
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{compiler}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{compiler} does not compile {source.name}: {error.stderr}") from error
    return library
