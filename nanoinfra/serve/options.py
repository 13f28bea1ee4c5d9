"""The flags of `nanoinfra generate` and `nanoinfra serve`. No torch here: `--help` must answer at once."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

UNITS = {"": 1, "B": 1, **{f"{k}iB": 1 << 10 * (i + 1) for i, k in enumerate("KMGT")},
         **{f"{k}B": 1000 ** (i + 1) for i, k in enumerate(("k", "M", "G", "T"))}}


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB", "1.5GiB", "2GB" or "1000000". Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([a-zA-Z]*)", text.strip())
    if not found or found[2] not in UNITS:
        raise ValueError(f"{text!r} is no number of bytes; write 512MiB, 1.5GiB, 2GB or 1000000")
    return int(float(found[1]) * UNITS[found[2]])


def _spelled(n):
    unit = next(unit for unit in ("GiB", "MiB", "KiB", "B") if n % UNITS[unit] == 0)
    return f"{n // UNITS[unit]}{unit}"


Bytes = Annotated[int, tyro.constructors.PrimitiveConstructorSpec(
    1, "BYTES", lambda given: parse_bytes(given[0]), lambda n: isinstance(n, int), lambda n: [_spelled(n)])]


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a text, or answer as a chat model."""
    model: tyro.conf.Positional[str]  # a run directory, a Hugging Face folder, a .gguf file, smollm2-135m
    prompt: tyro.conf.Positional[str]        # the text to go on from; with --chat, the question
    max_new_tokens: int = 128                # stop after so many
    temperature: float = 0.0                 # 0: always the likeliest token
    top_k: int = 0                           # draw among the k likeliest; 0: all
    top_p: float = 1.0                       # draw among the likeliest that make up this probability
    seed: int = 0                            # of the draws
    chat: bool = False                       # put the prompt into the model's chat template
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # to compute in
    tp: int = 1                              # cut the model over so many ranks, started here
    threads: int | None = None               # a rank; default: OMP_NUM_THREADS, or cores / ranks


@dataclass(frozen=True)
class EngineOptions:
    """The engine: what it computes in, and how much it takes on."""
    model: tyro.conf.Positional[str]  # a run directory, a Hugging Face folder, a .gguf file, smollm2-135m
    # to compute in; in bfloat16 who else asks may decide between two tokens that are nearly as likely
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tp: int = 1                              # cut the model over so many ranks, started here
    threads: int | None = None               # a rank; default: OMP_NUM_THREADS, or cores / ranks
    kv_memory: Bytes = 1 << 30               # for keys and values, on each rank
    block_size: int = 16                     # tokens whose keys and values lie together
    budget: int = 512                        # tokens in one step, of all sequences
    seats: int = 64                          # sequences that run at once
    queue: int = 1024                        # requests that may wait; more are told to come back later
    queue_tokens: int = 1 << 20              # tokens of theirs


@dataclass(frozen=True)
class ServeOptions:
    """Serve a model: an OpenAI API, and a page to chat and to watch the scheduler."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")]
    host: str = "127.0.0.1"                  # who may connect: this machine alone; 0.0.0.0: everybody
    port: int = 8000                         # 0: one that is free
    name: str | None = None                  # what clients call the model; default: as given
    api_key_file: Path | None = None         # keys, one a line; default: NANOINFRA_API_KEY
    api_key: str | None = field(default=None, repr=False)    # a key, which ps shows to everybody here
    allow_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # of web pages that may ask; *: all
    cache_salt_per_key: bool = False         # nobody learns from cached_tokens what other keys' prompts share
    drain: float = 30.0                      # seconds that running requests have, when a signal ends it


def check(options: ServeOptions) -> None:
    """Raise ValueError for a flag that no server could follow."""
    engine = options.engine
    least = {"--tp": (engine.tp, 1), "--block-size": (engine.block_size, 1), "--budget": (engine.budget, 1),
             "--seats": (engine.seats, 1), "--queue": (engine.queue, 1), "--port": (options.port, 0),
             "--queue-tokens": (engine.queue_tokens, 1), "--drain": (options.drain, 0),
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
