"""The flags of `nanoinfra generate` and `nanoinfra serve`. No torch here: `--help` must answer at once."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

_BYTE_UNITS = {"": 1, "B": 1, **{f"{k}iB": 1 << 10 * (i + 1) for i, k in enumerate("KMGT")},
               **{f"{k}B": 1000 ** (i + 1) for i, k in enumerate(("k", "M", "G", "T"))}}


def parse_byte_size(text: str) -> int:
    """Bytes of "512MiB", "1.5GiB", "2GB" or "1000000". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-zA-Z]*)", text.strip())
    if not found or found[2] not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is no number of bytes; write 512MiB, 1.5GiB, 2GB or 1000000")
    return int(float(found[1]) * _BYTE_UNITS[found[2]])


def _spelled(n):
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if n % _BYTE_UNITS[unit] == 0)
    return f"{n // _BYTE_UNITS[unit]}{unit}"


ByteSize = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    1, "BYTES", lambda given: parse_byte_size(given[0]), lambda n: isinstance(n, int),
    lambda n: [_spelled(n)])]


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text, or answer as a chat model."""
    model: tyro.conf.Positional[str]  # a run directory, a Hugging Face folder, a .gguf file, smollm2-135m
    prompt: tyro.conf.Positional[str]        # the text to continue; with --chat, the user's message
    max_new_tokens: int = 128                # stop after so many new tokens
    temperature: float = 0.0                 # of sampling; 0: greedy, always the likeliest token
    top_k: int = 0                           # sample among the k likeliest tokens; 0: among all
    top_p: float = 1.0                       # sample among the likeliest tokens that make up this probability
    seed: int = 0                            # of the sampling
    chat: bool = False                       # put the prompt into the model's chat template
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of weights and computation
    tp: int = 1                              # tensor parallelism: split the model over so many local ranks
    threads: int | None = None               # per rank; default: OMP_NUM_THREADS, or cores / ranks


@dataclass(frozen=True)
class EngineOptions:
    """The engine: its model and dtype, its KV memory, and how much it computes in a step."""
    model: tyro.conf.Positional[str]  # a run directory, a Hugging Face folder, a .gguf file, smollm2-135m
    # of weights and computation; in bfloat16 a near tie of two tokens may depend on the other requests
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tp: int = 1                              # tensor parallelism: split the model over so many local ranks
    threads: int | None = None               # per rank; default: OMP_NUM_THREADS, or cores / ranks
    kv_memory: ByteSize = 1 << 30            # for the KV cache (keys and values), on each rank
    block_size: int = 16                     # tokens in a block of the paged KV cache
    max_num_batched_tokens: int = 512        # tokens computed in one step, of all sequences
    max_num_seqs: int = 64                   # sequences that run at once
    max_queued_requests: int = 1024          # requests that may wait; more are refused with status 429
    max_queued_tokens: int = 1 << 20         # prompt tokens of the requests that wait


@dataclass(frozen=True)
class ServeOptions:
    """Serve a model: an OpenAI API, and a page to chat and to watch the scheduler."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"                  # address to listen on: this machine alone; 0.0.0.0: everybody
    port: int = 8000                         # to listen on; 0: any free port
    served_model_name: str | None = None     # what clients call the model; default: as given
    api_key_file: Path | None = None         # API keys, one a line; default: NANOINFRA_API_KEY
    api_key: str | None = field(default=None, repr=False)    # an API key, which ps shows to everybody here
    allow_origin: tyro.conf.UseAppendAction[tuple[str,
                                                  ...]] = ()  # of web pages that may send requests; *: all
    cache_salt_per_key: bool = False         # requests of different API keys share no cached prefixes
    shutdown_timeout: float = 30.0           # seconds that running requests may still take after SIGTERM


def check_serve_options(options: ServeOptions) -> None:
    """Raise ValueError for a flag that no server could follow."""
    engine = options.engine
    least = {"--tp": (engine.tp, 1), "--block-size": (engine.block_size, 1),
             "--max-num-batched-tokens": (engine.max_num_batched_tokens, 1),
             "--max-num-seqs": (engine.max_num_seqs, 1),
             "--max-queued-requests": (engine.max_queued_requests, 1), "--port": (options.port, 0),
             "--max-queued-tokens": (engine.max_queued_tokens, 1),
             "--shutdown-timeout": (options.shutdown_timeout, 0),
             "--threads": (1 if engine.threads is None else engine.threads, 1)}
    for flag, (value, lowest) in least.items():
        if not value >= lowest:
            raise ValueError(f"{flag} {value} is too small; give at least {lowest}")
    if options.port > 65535:
        raise ValueError(f"--port {options.port} is too large; give at most 65535, or 0 for one that is free")
    for origin in options.allow_origin:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
            raise ValueError(f"--allow-origin {origin} is no origin; give a scheme and a host, without a "
                             "path, as https://example.com or http://localhost:3000, or * for all")
