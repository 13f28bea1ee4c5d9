"""The C kernels of decoding on a CPU (decode.c), compiled for this processor when a model is opened."""
import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

POINTER, LONG, DOUBLE = ctypes.c_void_p, ctypes.c_long, ctypes.c_double
ARGUMENTS = {"add_norm": [POINTER] * 4 + [LONG] * 2 + [DOUBLE],
             "swiglu": [POINTER] * 2 + [LONG] * 2,
             "place": [POINTER] * 3 + [DOUBLE] + [POINTER] * 4 + [LONG] * 2,
             "attend": [POINTER] * 5 + [LONG] * 4,
             "likeliest": [POINTER] * 2 + [LONG] * 2,
             "gemv": [POINTER] * 4 + [LONG] * 2,
             "instructions": []}


def compiled(dtype: torch.dtype, **defined: int) -> ctypes.CDLL:
    """decode.c for numbers of `dtype`, bfloat16 or float32, with these names defined.

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
    source, compiler = Path(__file__).with_name("decode.c"), os.environ.get("CC", "cc")
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


def likeliest(passes: ctypes.CDLL, logits: torch.Tensor) -> list[int]:
    """engine.likeliest of `logits` (N, V)."""
    found = torch.empty(len(logits), dtype=torch.int64)
    passes.likeliest(found.data_ptr(), logits.data_ptr(), *logits.shape)
    return found.tolist()
